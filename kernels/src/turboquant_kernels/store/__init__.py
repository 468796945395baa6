"""Writing new keys and values into the compressed paged cache."""
