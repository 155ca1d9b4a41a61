"""The accelerators' compilers start before JAX does."""

from pshare_jax.bench.accelerators import prepare

prepare()
