"""The mathematics, in torch or by the kernels, which no other room may import. Imports settings."""
