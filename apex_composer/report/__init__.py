"""What runs did, as one HTML file. Imports `evaluate` and what is before it."""
