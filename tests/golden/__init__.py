"""Tiny checkpoints and the logits that transformers computes of them, see `make_golden.py`."""

from pathlib import Path

GOLDEN = Path(__file__).parent
CASES = tuple(sorted(path.stem for path in GOLDEN.glob("*.json")))
