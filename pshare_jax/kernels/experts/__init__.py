"""Feed-forward blocks of which each token takes a few experts."""
