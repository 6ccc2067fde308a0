"""Which documents go where. Imports options, read and tokens."""
