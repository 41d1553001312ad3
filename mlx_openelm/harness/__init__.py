"""Tasks that measure a model: lm-eval's, those of the paper, and the comparison with what Apple published."""
