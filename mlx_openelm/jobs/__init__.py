"""Jobs on whole models, most of them from folder to folder: convert, quantize, fuse, export, average, summarize."""
