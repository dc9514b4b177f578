"""For workloads: a client of the Workload API."""
