"""Node attestors: how an agent proves its node."""
