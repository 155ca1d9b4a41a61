"""Another library's reading of a model: run by an interpreter that has it, not by ours.

`python referee_worker.py KIND MODEL FOLDER` reads `FOLDER/question.json`: `prompts`, their tokens
by our reading, a conversation `messages`, and `tool`. It leaves `FOLDER/answer.json` (the library's
name and version, its own tokens of the prompts, its renderings of the conversation without and with
the tool, its end tokens; what it does not say is null) and `FOLDER/logits.npy`, float32
`[positions, vocab]`, after our tokens. Nothing of this package is imported here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Logits = Callable[[Sequence[int]], np.ndarray]
"""The tokens of one prompt -> float32 `[tokens, vocab]`."""


def read_transformers(model: str, question: dict[str, Any]) -> tuple[dict[str, Any], Logits]:
    """A Hugging Face folder by transformers, in float32."""
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    options = {"local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, **options)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, **options
    ).eval()

    def rendered(tools: list[Any] | None) -> str | None:
        try:
            return tokenizer.apply_chat_template(
                question["messages"], tools=tools, add_generation_prompt=True, tokenize=False
            )
        except Exception:  # no template, or one that refuses
            return None

    ends = network.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    answer = {
        "library": f"transformers {version('transformers')}",
        "tokens": [tokenizer(prompt)["input_ids"] for prompt in question["prompts"]],
        "rendered": [rendered(None), rendered([question["tool"]])],
        "ends": [ends] if isinstance(ends, int) else ends,
    }

    def logits(tokens: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            return network(torch.tensor([list(tokens)])).logits[0].float().numpy()

    return answer, logits


def read_llama_cpp(model: str, question: dict[str, Any]) -> tuple[dict[str, Any], Logits]:
    """A GGUF file by llama.cpp, through llama-cpp-python or llama-cpp-py-sync."""
    longest = max(map(len, question["tokens"])) + 1
    try:
        return _llama_cpp_python(model, question, longest)
    except ImportError:
        return _llama_cpp_py_sync(model, question, longest)


def _llama_cpp_python(model: str, question: dict[str, Any], longest: int) -> tuple[dict, Logits]:
    import llama_cpp  # type: ignore[import-not-found]

    llama = llama_cpp.Llama(model, n_ctx=longest, logits_all=True, verbose=False)
    answer = {
        "library": f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}",
        "tokens": [llama.tokenize(p.encode(), special=True) for p in question["prompts"]],
        "rendered": None,
        "ends": None,
    }

    def logits(tokens: Sequence[int]) -> np.ndarray:
        llama.reset()
        llama.eval(list(tokens))
        return np.array(llama.scores[: len(tokens)], np.float32)

    return answer, logits


def _llama_cpp_py_sync(model: str, question: dict[str, Any], longest: int) -> tuple[dict, Logits]:
    import llama_cpp_py_sync  # type: ignore[import-not-found]

    # Keys and values in float32, and no flash attention, which would round.
    llama = llama_cpp_py_sync.Llama(
        model, n_ctx=longest, n_batch=longest, type_k="f32", type_v="f32", flash_attn_type=0
    )
    lib, ffi = llama._lib, llama._ffi
    answer = {
        "library": f"llama.cpp of llama-cpp-py-sync {version('llama-cpp-py-sync')}",
        "tokens": [llama.tokenize(p, parse_special=True) for p in question["prompts"]],
        "rendered": None,
        "ends": None,
    }

    def logits(tokens: Sequence[int]) -> np.ndarray:
        llama._clear_context_state()
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if (code := lib.llama_decode(llama._ctx, batch)) != 0:
                raise RuntimeError(f"llama_decode gave {code}")
            size = 4 * llama.n_vocab
            rows = (lib.llama_get_logits_ith(llama._ctx, i) for i in range(len(tokens)))
            return np.stack([np.frombuffer(ffi.buffer(row, size), np.float32) for row in rows])
        finally:
            lib.llama_batch_free(batch)

    return answer, logits


READERS = {"transformers": read_transformers, "llama.cpp": read_llama_cpp}


def main(kind: str, model: str, folder: str) -> None:
    """Answers the question in `folder`."""
    question = json.loads((Path(folder) / "question.json").read_text())
    answer, logits = READERS[kind](model, question)
    (Path(folder) / "answer.json").write_text(json.dumps(answer))
    count, done, out = sum(map(len, question["tokens"])), 0, None
    for tokens in question["tokens"]:
        rows = logits(tokens)
        if out is None:
            shape, path = (count, rows.shape[1]), Path(folder) / "logits.npy"
            out = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        out[done : done + len(rows)] = rows
        done += len(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
