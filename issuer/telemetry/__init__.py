"""Metric names, in one place."""
