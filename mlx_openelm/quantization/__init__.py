"""Quantization: which matrices get how many bits, by which method, and at what cost."""
