"""Who does the work: processes of this machine. Imports errors."""
