"""A LoRA module that acts from its invocation on: up to there, it is its base.

    pshare convert decoder checkpoints/base checkpoints/mine --lora ALORA_FOLDER
    pshare serve --config mine.yaml             # `base` and the module `mine`
    python examples/activated_lora.py --model mine

The module was trained to begin its work at a sequence of tokens, its invocation. A prompt without
it is answered by the base; one with it shares the base's KV cache of everything before it, however
long that is. The server tells the invocation in `/v1/models`.
"""

from __future__ import annotations

import argparse

import openai

CONTEXT = "The harbour was quiet, and the last ferry had left. " * 6


def main() -> None:
    """Asks the base, the module without its invocation, and the module with it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--base", default="base", help="a model that is the base itself")
    parser.add_argument("--model", required=True, help="the module with an invocation")
    parser.add_argument("--max-tokens", type=int, default=16)
    args = parser.parse_args()

    with openai.OpenAI(base_url=f"{args.url}/v1", api_key=args.api_key) as client:
        tail = client.models.retrieve(args.model).tail
        if not (isinstance(tail, dict) and "invocation" in tail):
            parser.error(f"{args.model} has no invocation: its tail is {tail}")
        # Not an endpoint of OpenAI's; the client calls it all the same.
        tokens = client.post(
            f"{args.url}/tokenize", body={"prompt": CONTEXT}, cast_to=dict[str, object]
        )["tokens"]
        prompts = {
            f"{args.base}": (args.base, tokens),
            f"{args.model}, not invoked": (args.model, tokens),
            f"{args.model}, invoked": (args.model, [*tokens, *tail["invocation"]]),
        }
        for name, (model, prompt) in prompts.items():
            reply = client.completions.create(
                model=model, prompt=prompt, max_tokens=args.max_tokens, temperature=0
            )
            usage = reply.usage
            print(
                f"{name}: {usage.prompt_tokens_details.shared_tokens} of {usage.prompt_tokens} "
                f"prompt tokens from another model: {reply.choices[0].text!r}"
            )


if __name__ == "__main__":
    main()
