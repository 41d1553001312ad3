"""Fewer bits a weight: what to quantize, how, and what it costs."""
