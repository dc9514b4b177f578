"""SVIDs as files beside a program that knows nothing of SPIFFE."""
