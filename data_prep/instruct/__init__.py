"""Instruction data: chats, or prompts with responses, for llm-foundry's finetuning loader."""
