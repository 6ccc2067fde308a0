"""From files of every release to documents. Imports errors."""
