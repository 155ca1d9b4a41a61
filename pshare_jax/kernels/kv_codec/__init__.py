"""Lossless compression of KV pages."""
