"""Callbacks for any llm-foundry run. Imports what trainer imports."""
