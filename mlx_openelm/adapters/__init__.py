"""Adapters: in a model, in files, switched and mixed, and merged into weights."""
