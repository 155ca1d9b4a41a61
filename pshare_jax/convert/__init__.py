"""Checkpoints in and out: Hugging Face, PEFT and GGUF to orbax and back."""
