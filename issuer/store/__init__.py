"""SQL and nothing but SQL: repositories over one connection, and the store that runs them."""
