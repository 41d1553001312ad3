"""How good a model is: perplexity and divergence."""
