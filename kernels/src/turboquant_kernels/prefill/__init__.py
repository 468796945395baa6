"""Attention of chunks of new tokens to a compressed context, through decompressed tiles of it."""
