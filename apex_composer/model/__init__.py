"""Architectures: which weights are expanded, and their SwiGLU. Imports settings and ops."""
