"""Callbacks for any llm-foundry run, with or without APEX. Imports what comes before trainer."""
