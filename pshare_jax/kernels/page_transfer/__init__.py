"""Moving whole pages."""
