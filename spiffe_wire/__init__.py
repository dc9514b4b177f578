"""How it is sent: protobuf, status codes, TLS, sockets, peers, settings, logs."""
