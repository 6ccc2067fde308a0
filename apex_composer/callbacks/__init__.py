"""Callbacks for any llm-foundry run. Imports trainer and what stands before it, and data_prep."""
