"""What an API server says of pods, nodes and accounts, and how it is asked."""
