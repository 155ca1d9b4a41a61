"""The KV cache: the page shape, the device pools, and the host's book-keeping of pages."""
