"""What a model is, and what training changed. Imports `evaluate` and what is before it."""
