"""Several models in turn over one growing conversation, with the ordinary openai client.

    make serve
    pip install openai
    python examples/agents_over_one_context.py

Every model gets the whole conversation so far. What an earlier one computed is not computed again:
`shared_tokens` of a reply's usage are prompt tokens whose KV came from another model's call.
"""

from __future__ import annotations

import argparse

import openai

CONTEXT = (
    "Jack is married to Anna. They have a child called Finn. Finn is married to Susan. "
    "Susan and Finn have two children, Mia and Leo. Leo keeps bees, and Mia sails."
)
QUESTIONS = (
    "What is Susan to Anna? Answer with a single word.",
    "What is Jack to Mia? Answer with a single word.",
    "What is Leo to Mia? Answer with a single word.",
)


def main() -> None:
    """Asks each question to each model, in one conversation."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--models", nargs="+", default=["family", "base", "tools"])
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()

    messages = [{"role": "user", "content": CONTEXT}]
    print(f"{'model':10} {'prompt':>7} {'cached':>7} {'shared':>7}  answer")
    with openai.OpenAI(base_url=args.url, api_key=args.api_key) as client:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            for model in args.models:
                reply = client.chat.completions.create(
                    model=model, messages=messages, max_tokens=args.max_tokens, temperature=0
                )
                text, usage = reply.choices[0].message.content or "", reply.usage
                details = usage.prompt_tokens_details
                # Not a field of OpenAI's: the client keeps it all the same.
                shared = details.shared_tokens
                print(
                    f"{model:10} {usage.prompt_tokens:7} {details.cached_tokens:7} {shared:7}  "
                    f"{text!r}"
                )
                messages.append({"role": "assistant", "content": text})


if __name__ == "__main__":
    main()
