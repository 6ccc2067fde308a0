"""The methods that APEX is compared with, by their names in a YAML. Imports as callbacks does."""
