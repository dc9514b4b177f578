"""What the server itself knows of a cluster's pods, and what it signs by (architecture A5)."""
