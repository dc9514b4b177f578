"""gRPC servicers: thin; access.py says who may call what."""
