"""What a model knows: perplexity per domain, and tasks. Imports `tools` and what is before it."""
