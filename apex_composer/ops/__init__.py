"""The mathematics, in torch or by the kernels (imported nowhere else). Imports settings."""
