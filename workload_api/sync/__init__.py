"""Keeping the cache in step with the server."""
