"""What SPIFFE means: IDs, SVIDs, bundles, selectors, entries, decisions.  No clock, no I/O."""
