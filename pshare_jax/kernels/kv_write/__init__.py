"""Storing new K and V in their pages."""
