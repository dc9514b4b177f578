"""Domain values to protobuf and back; every rule a value has is checked on the way in."""
