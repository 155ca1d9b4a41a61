"""Makes the golden files: a tiny random checkpoint of each architecture and its logits.

Needs torch and transformers 5 (neither is needed to run the tests):

    python tests/golden/make_golden.py [CASE ...]

Each `<case>.safetensors` holds the tensors (float16, to be small) of a checkpoint as transformers
saves them, plus `golden.input_ids [1, T]` int64 and `golden.logits [1, T, vocab]` float32 as
transformers computes them in float32 with eager attention; `<case>.json` is its `config.json`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PixtralVisionConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
    SmolLM3Config,
)

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
THETA = {"rope_theta": 10000.0}
# A tenth of the tokens below: stretched and unstretched components in a head of 8.
YARN_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    **THETA,
}
YARN_OPTIONS = {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 8.0, "truncate": False}
# Six of a head's eight components rotate. The tokens below are fewer, or more, than the length up
# to which the first list counts.
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.5, 9.0],
    **THETA,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
CASES: dict[str, PretrainedConfig] = {
    "llama3": LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE),
    "llama_tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral": MistralConfig(**TINY, sliding_window=7),
    "qwen2": Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "yarn": Qwen2Config(**TINY, rope_parameters=YARN_ROPE),
    "yarn_mscale": LlamaConfig(**TINY, rope_parameters={**YARN_ROPE, **YARN_OPTIONS}),
    "linear": LlamaConfig(**TINY, rope_parameters={"rope_type": "linear", "factor": 4.0, **THETA}),
    "dynamic": MistralConfig(
        **TINY, rope_parameters={"rope_type": "dynamic", "factor": 2.0, **THETA}
    ),
    "qwen2_windows": Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "gemma": GemmaConfig(**TINY, head_dim=16),
    "gemma2": Gemma2Config(
        **TINY, head_dim=16, sliding_window=7, query_pre_attn_scalar=24, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(
        **{**TINY, "num_hidden_layers": 3},
        head_dim=16,
        sliding_window=7,
        sliding_window_pattern=3,
        query_pre_attn_scalar=24,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **{**TINY, "num_hidden_layers": 3},
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[1],
    ),
    "phi3": Phi3Config(**TINY, pad_token_id=0, sliding_window=7),
    "llama_bias": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "smollm3": SmolLM3Config(**TINY, pad_token_id=0, no_rope_layers=[1, 0]),
    "granite": GraniteConfig(
        **TINY,
        embedding_multiplier=12.0,
        attention_multiplier=0.2,
        residual_multiplier=0.22,
        logits_scaling=4.0,
    ),
    "olmo2": Olmo2Config(**TINY, pad_token_id=0),
    "gemma3_vision": Gemma3Config(
        text_config=Gemma3TextConfig(**TINY, head_dim=16, sliding_window=7).to_dict(),
        vision_config=SiglipVisionConfig(**VISION).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=99,
    ),
    "mistral3": Mistral3Config(
        text_config=MistralConfig(**TINY, sliding_window=None).to_dict(),
        vision_config=PixtralVisionConfig(**VISION).to_dict(),
        image_token_index=99,
    ),
    "llava": LlavaConfig(
        text_config=LlamaConfig(**TINY).to_dict(),
        vision_config=CLIPVisionConfig(**VISION).to_dict(),
        image_token_index=99,
    ),
    **{
        f"phi3_{name}": Phi3Config(
            **TINY,
            pad_token_id=0,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=original,
            rope_parameters=LONGROPE,
        )
        for name, original in (("short", 64), ("long", 16))
    },
    "gpt_oss": GptOssConfig(
        **TINY,
        pad_token_id=0,
        head_dim=16,
        sliding_window=7,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=0.5,
        rope_parameters={**YARN_ROPE, "truncate": False},
    ),
}
"""Its place decides a case's seed: new ones go to the end."""
TOKENS = 32


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter anew, so that norms and biases take part in the result.

    Values are rounded to float16, so that the saved checkpoint is exactly what was computed with.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            # Gemma multiplies by 1 + weight.
            value = ("gemma" not in model.config.model_type) + 0.2 * noise
        elif name.endswith(("bias", "sinks")):
            value = 0.3 * noise
        else:
            value = noise * parameter.shape[-1] ** -0.5
        parameter.copy_(value.half())


@torch.no_grad()
def main() -> None:
    """Writes all cases beside this script."""
    folder = Path(__file__).parent
    wanted = sys.argv[1:] or list(CASES)
    for seed, (case, config) in enumerate(CASES.items()):
        if case not in wanted:
            continue
        generator = torch.Generator().manual_seed(seed)
        kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else None
        kind = kind or AutoModelForCausalLM
        model = kind.from_config(config, attn_implementation="eager").to(torch.float32).eval()
        randomise(model, generator)
        vocab_size = config.get_text_config().vocab_size
        # Below the image token, where there is one.
        highest = getattr(config, "image_token_index", vocab_size)
        input_ids = torch.randint(0, highest, (1, TOKENS), generator=generator)
        logits = model(input_ids=input_ids).logits
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            tensors = load_file(f"{saved}/model.safetensors")
            config_json = json.loads(Path(saved, "config.json").read_text())
        tensors = {name: t.half().contiguous() for name, t in tensors.items()}
        tensors |= {"golden.input_ids": input_ids, "golden.logits": logits}
        save_file(tensors, folder / f"{case}.safetensors")
        del config_json["transformers_version"]
        (folder / f"{case}.safetensors").chmod(0o644)
        (folder / f"{case}.json").write_text(json.dumps(config_json, indent=2) + "\n")


if __name__ == "__main__":
    main()
