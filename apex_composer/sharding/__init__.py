"""Weights cut by FSDP and HSDP. Imports all rooms before it, up to operators."""
