"""The server: store, services, attestation, APIs, CLI."""
