"""The job of `make compare`: one base model, one set of batches, every method. Imports all."""
