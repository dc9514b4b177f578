"""The Workload API and the admin services, behind the front door."""
