"""From files of every release to documents. Imports errors and the top's names of files."""
