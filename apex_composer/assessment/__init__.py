"""Scores of units from activations, and the selection they lead to. Imports ops and model."""
