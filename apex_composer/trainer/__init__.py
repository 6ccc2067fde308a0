"""APEX under Composer and llm-foundry. Imports the expander and the rooms before it."""
