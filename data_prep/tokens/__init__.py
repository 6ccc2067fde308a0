"""From documents to tokens. Imports read."""
