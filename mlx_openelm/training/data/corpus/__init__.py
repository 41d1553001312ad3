"""Pretraining's data: from files of text to the batches of each update, with positions to continue from.

`loader.PretrainingData` gives the batches, `validation.read_validation` the text to validate on.
"""
