"""Attention over the compressed paged cache."""
