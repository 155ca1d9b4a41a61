"""The real server over scripted answers, as the other clients have it."""

from tests.clients.conftest import answers, base_url, prompts, served

__all__ = ["answers", "base_url", "prompts", "served"]
