"""Chats, and prompts with responses, for llm-foundry's loader. Imports all rooms before it."""
