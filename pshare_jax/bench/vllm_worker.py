"""vLLM's engine behind a pipe, for `bench micro`: run by an interpreter that has vLLM, not by ours.

Standard input has a JSON object a line, `{"submit", "prompt", "max_tokens"}` or `{"abort"}`.
Standard output has `{"packages"}` once it is ready, then a line for each step of the engine that
brought tokens: `{"events": [[request id, new tokens, whether it has ended]]}`.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from importlib.metadata import version

PACKAGES = ("vllm", "torch")


def main(model: str, max_model_len: str, max_num_seqs: str, kv_gib: str) -> None:
    """Serves until standard input ends."""
    # What is printed on standard output by others goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = kv_gib
    from vllm import EngineArgs, LLMEngine, SamplingParams  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=model,
            dtype="bfloat16",
            max_model_len=int(max_model_len),
            max_num_seqs=int(max_num_seqs),
            skip_tokenizer_init=True,
        )
    )
    messages: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(messages,), daemon=True).start()
    print(json.dumps({"packages": {name: version(name) for name in PACKAGES}}), file=answers)
    live: set[str] = set()
    while True:
        while not engine.has_unfinished_requests() or not messages.empty():
            message = messages.get()
            if message is None:
                return
            if (aborted := message.get("abort")) is not None:
                if aborted in live:
                    engine.abort_request([aborted])
                    live.remove(aborted)
                    print(json.dumps({"events": [[aborted, 0, True]]}), file=answers)
                continue
            params = SamplingParams(
                temperature=0.0,
                max_tokens=message["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            prompt = {"prompt_token_ids": message["prompt"]}
            engine.add_request(message["submit"], prompt, params)
            live.add(message["submit"])
        outputs = engine.step()
        live -= {output.request_id for output in outputs if output.finished}
        events = [[o.request_id, len(o.outputs[0].token_ids), o.finished] for o in outputs]
        if events:
            print(json.dumps({"events": events}), file=answers)


def _read(messages: queue.SimpleQueue[dict | None]) -> None:
    for line in sys.stdin:
        messages.put(json.loads(line))
    messages.put(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
