"""Whole models, from folder to folder."""
