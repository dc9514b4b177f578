"""The agent, and the client library."""
