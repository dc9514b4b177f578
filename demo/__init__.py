"""`make demo`: a trust domain on this machine, told as a story in a screen and a half."""

import os

# Before grpcio is loaded: it would print a line about each child that is started, and none of
# the demo's children goes on using its parent's channels.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
