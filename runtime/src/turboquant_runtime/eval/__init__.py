"""`tq eval`: what a compressed KV cache costs in quality, measured through the engine's real cache."""
