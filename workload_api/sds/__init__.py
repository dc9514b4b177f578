"""Envoy's secret discovery service: SVIDs and bundles as Envoy wants them."""
