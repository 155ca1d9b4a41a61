"""Text and tokens: no jax here."""
