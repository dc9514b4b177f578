"""The signing: profiles, keys, rotation.  Knows no database and no transport."""
