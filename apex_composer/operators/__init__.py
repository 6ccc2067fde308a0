"""The expansion operators, their optimizer, their step. Imports ops, model and assessment."""
