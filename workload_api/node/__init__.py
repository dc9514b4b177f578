"""Proving this node, and staying proved."""
