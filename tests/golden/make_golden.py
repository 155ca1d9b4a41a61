"""Makes the golden files: a tiny random checkpoint of each architecture and its logits.

Needs torch and transformers 5 (neither is needed to run the tests):

    python tests/golden/make_golden.py

Each `<case>.safetensors` holds the checkpoint's tensors (float16, to be small) under their Hugging
Face names, plus `golden.input_ids [1, T]` int64 and `golden.logits [1, T, vocab]` float32 as
transformers computes them in float32 with eager attention; `<case>.json` is its `config.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Frequencies of head_dim 8 at theta 1e4 fall into all three bands of this scaling.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CASES: dict[str, PretrainedConfig] = {
    "llama3": LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE),
    "llama_tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral": MistralConfig(**TINY, sliding_window=7),
    "qwen2": Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
}
TOKENS = 32


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter anew, so that norms and biases take part in the result.

    Values are rounded to float16, so that the saved checkpoint is exactly what was computed with.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        else:
            value = noise * parameter.shape[-1] ** -0.5
        parameter.copy_(value.half())


@torch.no_grad()
def main() -> None:
    """Writes all cases beside this script."""
    folder = Path(__file__).parent
    for seed, (case, config) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.to(torch.float32).eval()
        randomise(model, generator)
        input_ids = torch.randint(0, config.vocab_size, (1, TOKENS), generator=generator)
        logits = model(input_ids).logits
        tensors = {name: t.half().contiguous() for name, t in model.state_dict().items()}
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        tensors |= {"golden.input_ids": input_ids, "golden.logits": logits}
        save_file(tensors, folder / f"{case}.safetensors")
        config_json = json.loads(model.config.to_json_string())
        config_json["architectures"] = [type(model).__name__]
        del config_json["transformers_version"]
        (folder / f"{case}.safetensors").chmod(0o644)
        (folder / f"{case}.json").write_text(json.dumps(config_json, indent=2) + "\n")


if __name__ == "__main__":
    main()
