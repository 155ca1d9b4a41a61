"""A whole decoder layer in one call, for CPUs."""
