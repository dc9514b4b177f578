"""What SPIFFE means: IDs, SVIDs, bundles, selectors, entries, decisions.  Pure, no clock, no I/O."""
