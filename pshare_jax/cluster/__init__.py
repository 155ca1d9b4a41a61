"""Hosts of workers: what runs cores and executors, and carries their messages."""
