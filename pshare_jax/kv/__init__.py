"""Connectors: how pages get from one pool to another."""
