"""Requests to prompts, tokens to answers: chat, tools, grammars, checks. Knows no HTTP."""
