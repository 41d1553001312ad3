"""Jobs on whole models, from folder to folder: convert, quantize, fuse, export, average, summarize."""
