"""The capacity model: the serving system in virtual time, and what it predicts."""
