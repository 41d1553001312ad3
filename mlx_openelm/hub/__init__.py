"""From names to folders: the catalog of models, the Hugging Face Hub, CoreNet's files."""
