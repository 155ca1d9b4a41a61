"""Activations times weights, with a gradient."""
