"""A whole run: its folder, its state, and what it reports."""
