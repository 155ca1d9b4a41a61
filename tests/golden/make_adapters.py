"""Makes `adapters.safetensors` and `adapters.jsonl`: adapters of every kind as PEFT saves them.

Needs torch, transformers 5 and peft (none of them is needed to run the tests):

    python tests/golden/make_adapters.py

Each line of the JSON file has a kind's name, the golden case that is its base, and PEFT's
`adapter_config.json`. The other file has its tensors as `<kind>/<PEFT's name>` (float16, to be
small), and `<kind>/logits [TOKENS, vocab]` float32 of the case's first tokens as transformers with
peft computes them.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parent
TOKENS = 6
ALL = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
SOME = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"only {name}": ("llama3", {"target_modules": [name]}) for name in ALL},
    "all": ("llama3", {"target_modules": ALL}),
    "all-linear": ("llama3", {"target_modules": "all-linear"}),
    "attention": ("llama3", {"target_modules": ALL[:4]}),
    "rank 1": ("llama3", {"r": 1}),
    "rank 9": ("llama3", {"r": 9, "lora_alpha": 5}),
    "rank-stabilised": ("llama3", {"use_rslora": True}),
    "negative alpha": ("llama3", {"lora_alpha": -3}),
    "rank pattern by leaf": ("llama3", {"rank_pattern": {"v_proj": 7}}),
    "rank pattern by name": (
        "llama3",
        {"rank_pattern": {"model.layers.1.self_attn.q_proj": 2, "down_proj": 3}},
    ),
    "rank pattern by expression": ("llama3", {"rank_pattern": {r".*\.0\..*q_proj": 6}}),
    # In the order in which PEFT saves them, which counts when they are read.
    "alpha pattern": ("llama3", {"alpha_pattern": {r"layers\.1\..*": 20, "q_proj": 3}}),
    "both patterns": (
        "llama3",
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
    ),
    "one layer": ("llama3", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "the first layer": ("llama3", {"layers_to_transform": 0}),
    "by expression": ("llama3", {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"}),
    "excluded": ("llama3", {"target_modules": ALL, "exclude_modules": ["k_proj", "gate_proj"]}),
    "another target in each layer": (
        "llama3",
        {"target_modules": ["0.self_attn.q_proj", "1.mlp.up_proj"]},
    ),
    "gaussian": ("llama3", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama3", {"init_lora_weights": "orthogonal"}),
    "dropout": ("llama3", {"lora_dropout": 0.3}),
    "dora": ("llama3", {"use_dora": True}),
    "dora on all": ("llama3", {"use_dora": True, "target_modules": ALL}),
    "dora with patterns": (
        "llama3",
        {"use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    ),
    "dora, rank-stabilised": ("llama3", {"use_dora": True, "use_rslora": True}),
    "saved head": ("llama3", {"modules_to_save": ["lm_head"]}),
    "saved embedding": ("llama3", {"modules_to_save": ["embed_tokens"]}),
    "saved head and embedding": ("llama3", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved norms": ("llama3", {"modules_to_save": ["norm", "input_layernorm"]}),
    "saved projection": ("llama3", {"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]}),
    "dora and a saved head": ("llama3", {"use_dora": True, "modules_to_save": ["lm_head"]}),
    "adapted head": ("llama3", {"target_modules": ["q_proj", "lm_head"]}),
    "adapted embedding": ("llama3", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tokens of their own": ("llama3", {"trainable_token_indices": [3, 5]}),
    "lora_bias": ("llama3", {"lora_bias": True}),
    "replicated layers": ("llama3", {"layer_replication": [[0, 2], [1, 2]]}),
    "pissa": ("llama3", {"init_lora_weights": "pissa"}),
    "olora": ("llama3", {"init_lora_weights": "olora"}),
    "activated": ("llama3", {"target_modules": ALL, "alora_invocation_tokens": "TOKENS"}),
    "activated, not invoked": ("llama3", {"alora_invocation_tokens": [127, 127, 127]}),
    "tied": ("llama_tied", {"target_modules": ALL}),
    "tied, saved head": ("llama_tied", {"modules_to_save": ["lm_head"]}),
    "tied, saved embedding": ("llama_tied", {"modules_to_save": ["embed_tokens"]}),
    "tied, adapted head": ("llama_tied", {"target_modules": ["q_proj", "lm_head"]}),
    "biases": ("qwen2", {"bias": "all"}),
    "biases of what is adapted": ("qwen2", {"bias": "lora_only"}),
    "biases everywhere": ("llama_bias", {"bias": "all", "target_modules": ALL}),
    "dora beside biases": ("llama_bias", {"use_dora": True, "target_modules": ALL}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"target_modules": ALL}),
    "qwen3": ("qwen3", {"target_modules": ALL}),
    "gemma": ("gemma", {"target_modules": ALL}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "gemma3, saved norms": (
        "gemma3",
        {"modules_to_save": ["q_norm", "post_feedforward_layernorm"]},
    ),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "mixtral": ("mixtral", {"target_modules": ALL[:4]}),
    "mixtral, experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "qwen3_moe": ("qwen3_moe", {"target_modules": ["q_proj", "o_proj"]}),
    "phi3, qkv": ("phi3", {"target_modules": ["qkv_proj"]}),
    "phi3, all": ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "phi3, patterns": (
        "phi3",
        {
            "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"],
            "rank_pattern": {"gate_up_proj": 6},
            "alpha_pattern": {"qkv_proj": 3},
        },
    ),
    "phi3, dora": ("phi3", {"target_modules": ["qkv_proj", "down_proj"], "use_dora": True}),
    "phi3_long": ("phi3_short", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}
OTHERS: dict[str, peft.PeftConfig] = {
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": peft.LoHaConfig(target_modules=SOME),
    "lokr": peft.LoKrConfig(target_modules=SOME),
    "vera": peft.VeraConfig(target_modules=["q_proj"]),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "adalora": peft.AdaLoraConfig(target_modules=SOME, total_step=10),
}
"""What is no LoRA."""


def base_model(case: str) -> tuple[Any, torch.Tensor]:
    """A golden case's model, and its tokens."""
    tensors = load_file(FOLDER / f"{case}.safetensors")
    tokens = tensors.pop("golden.input_ids")[:, :TOKENS]
    tensors.pop("golden.logits")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text((FOLDER / f"{case}.json").read_text())
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, attn_implementation="eager", dtype=torch.float32
        )
    return model.eval(), tokens


def randomise(model: Any, generator: torch.Generator) -> None:
    """Trains by chance: whatever may be trained is moved, to values that float16 holds."""
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + noise).half())


@torch.no_grad()
def main() -> None:
    """Writes both files beside this script."""
    tensors: dict[str, torch.Tensor] = {}
    lines: list[str] = []
    kinds: dict[str, tuple[str, Any]] = {**KINDS, **{n: ("llama3", c) for n, c in OTHERS.items()}}
    for seed, (kind, (case, about)) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        model, tokens = base_model(case)
        if isinstance(about, dict):
            invocation = about.get("alora_invocation_tokens")
            if invocation == "TOKENS":
                about = {**about, "alora_invocation_tokens": tokens[0, 2:4].tolist()}
            options = {"r": 4, "lora_alpha": 8, "target_modules": SOME, "task_type": "CAUSAL_LM"}
            about = peft.LoraConfig(**{**options, **about})
        adapted = peft.get_peft_model(model, about).eval()
        randomise(adapted, torch.Generator().manual_seed(seed))
        logits = adapted(input_ids=tokens).logits[0, -TOKENS:]
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            saved = load_file(f"{folder}/adapter_model.safetensors")
            config = json.loads(Path(folder, "adapter_config.json").read_text())
        for name in ("base_model_name_or_path", "peft_version", "auto_mapping"):
            config.pop(name, None)
        lines.append(json.dumps({"kind": kind, "case": case, "config": config}))
        tensors |= {f"{kind}/{name}": tensor.half() for name, tensor in saved.items()}
        tensors[f"{kind}/logits"] = logits.contiguous()
    save_file(tensors, FOLDER / "adapters.safetensors")
    (FOLDER / "adapters.safetensors").chmod(0o644)
    (FOLDER / "adapters.jsonl").write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
