"""The decoder, its weights, adapters, and the split into prefill and decode modules."""
