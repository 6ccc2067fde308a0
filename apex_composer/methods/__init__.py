"""The methods that APEX is compared with, one file each. Imports trainer and the rooms before."""
