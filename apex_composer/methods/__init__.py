"""The methods that APEX is compared with, one file each; none yet. Imports as callbacks does."""
