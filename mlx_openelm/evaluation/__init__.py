"""How good a model is: perplexity and KL divergence."""
