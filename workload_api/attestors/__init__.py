"""Who is calling: attestors turn a proven process into selectors."""
