"""The KV store: pages of prompts in shared memory and on disk, for all processes of a host."""
