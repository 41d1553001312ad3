"""From a prompt to text: sampling, decoding, stopping."""
