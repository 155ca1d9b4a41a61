"""Which pages of a pool are in use, and what they hold."""
