"""File formats, one module each, with reading and writing."""
