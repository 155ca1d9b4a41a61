"""The engine: prefill engines, decode engines, the handoff between them, and the oracle."""
