"""The engine's decisions as pure state machines: no jax, no threads, no clock."""
