"""The commands plan, doctor, show and branch. Imports any room but demo and cli."""
