"""Decode attention that reads pages shared by several rows once."""
