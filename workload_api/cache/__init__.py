"""Which workload gets what, now."""
