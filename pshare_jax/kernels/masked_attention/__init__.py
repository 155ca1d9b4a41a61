"""Attention of training under a mask, with a gradient."""
