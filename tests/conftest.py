"""What every test begins with."""

from spiffe_wire.descriptors import raise_limit

# As both daemons do: a shell's 1,024 are few for a test that holds hundreds of connections.
raise_limit()
