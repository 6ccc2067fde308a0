"""Which documents go where. Imports read and tokens."""
