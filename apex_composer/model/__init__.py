"""What is known of architectures: which weights are expanded. Imports ops and settings."""
