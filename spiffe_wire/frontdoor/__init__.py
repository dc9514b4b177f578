"""The front door: who knocks is proved before grpcio reads a byte (ADR 1)."""
