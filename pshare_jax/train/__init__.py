"""Cache-conditioned fine-tuning: decode modules trained on the frozen prefill module's KV."""
