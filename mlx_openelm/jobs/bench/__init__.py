"""Timing a model, alone or in turns with mlx-lm (`mlx-openelm bench`)."""
