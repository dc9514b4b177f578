"""What can be asked of the server: no gRPC, no SQL, no HTTP."""
