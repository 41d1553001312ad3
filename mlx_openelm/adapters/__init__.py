"""Low-rank adapters: what they are, in a model, in files, and fused into weights."""
