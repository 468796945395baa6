"""Attention of chunks of new tokens to a compressed context, through expanded tiles of it."""
