"""The host-only core: what is decided without a device, and without JAX in the import graph."""
