"""From a JSONL file to a LoRA decode module that answers beside its base.

    make checkpoints/smollm2-135m/pshare.json
    python examples/train_and_serve.py train.jsonl

A line of the file is {"prompt": ..., "completion": ...} or {"messages": [...]}. The module is
trained on the base's KV cache as it will be served, so the engine serves it `shared` afterwards:
the second model's prompt is not computed again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from pshare_jax import Engine
from pshare_jax.config import DecodeConfig, ModelEntry, PrefillConfig, ServeConfig


def train(args: argparse.Namespace) -> Path:
    """Trains a module with the command line that `pshare train` is; gives its folder."""
    command = [sys.executable, "-m", "pshare_jax.train"]
    options = {
        "base": args.base,
        "output": args.output,
        "data.train": json.dumps([args.data]),
        "lora.rank": args.rank,
        "tail": args.tail,
        "optimizer.learning_rate": args.learning_rate,
        "optimizer.epochs": args.epochs,
        "optimizer.batch_size": args.batch_size,
    }
    subprocess.run([*command, *(f"--{key}={value}" for key, value in options.items())], check=True)
    return Path(args.output) / "decode_module"


def main() -> None:
    """Trains, then asks the base and the module the same question."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="JSONL file of examples")
    parser.add_argument("--base", default="checkpoints/smollm2-135m")
    parser.add_argument("--output", default="runs/example")
    parser.add_argument("--prompt", help="question; by default that of the first example")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tail", default="32")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    module = train(args)
    config = ServeConfig(
        base=args.base,
        models=[ModelEntry("base"), ModelEntry("mine", str(module))],
        max_model_len=512,
        prefill=PrefillConfig(chunk_buckets=[128]),
        decode=DecodeConfig(batch_buckets=[1], max_num_seqs=1),
    )
    first = json.loads(Path(args.data).read_text().splitlines()[0])
    messages = first.get("messages", [{"role": "user", "content": first.get("prompt", "")}])[:1]
    if args.prompt is not None:
        messages = [{"role": "user", "content": args.prompt}]
    with Engine.from_config(config) as engine:
        for model in ("base", "mine"):
            answer = engine.chat(model, messages, max_tokens=args.max_tokens)
            usage = answer.usage
            print(
                f"{model}: {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached, "
                f"{usage.shared_tokens} from another model: {answer.text!r}"
            )


if __name__ == "__main__":
    main()
