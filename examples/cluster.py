"""A client of a cluster: several models over one context, at any frontend, and no stream is lost.

    make serve-cluster                           # two frontends, ports 8000 and 8001
    pip install httpx
    python examples/cluster.py --break-after 5

Calls go to the frontends in turn: what a model has computed for one of them, the models that are
asked at another one read. A stream whose frontend has died is gone on with at the next: the same
request again, with the id of the last event that came. `--break-after` hangs up after so many
events of each stream, so that this is seen without killing anything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx

CONTEXT = (
    "Jack is married to Anna. They have a child called Finn. Finn is married to Susan. "
    "Susan and Finn have two children, Mia and Leo. Leo keeps bees, and Mia sails.\n"
)
ATTEMPTS = 20


def events(
    client: httpx.Client, url: str, body: dict[str, Any], last: str | None
) -> Iterator[tuple[str | None, dict[str, Any] | None]]:
    """Each event of a stream after the one with the id `last`: its id, and what it says.

    The last one says nothing (None): the stream is whole.

    Raises:
        httpx.TransportError: the frontend cannot be reached, or has hung up.
        httpx.HTTPStatusError: it refuses the request.
    """
    headers = {} if last is None else {"Last-Event-ID": last}
    with client.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                last = value
            elif name == "data":
                yield last, None if value == "[DONE]" else json.loads(value)


def ask(
    client: httpx.Client, urls: Iterator[str], body: dict[str, Any], break_after: int
) -> tuple[str, dict[str, Any], list[str]]:
    """The text of an answer, its usage, and the frontends that it came from.

    Raises:
        RuntimeError: none of many attempts came to an end.
        httpx.HTTPStatusError: a frontend refuses the request: so would the others.
    """
    text, usage, last, asked = "", {}, None, []
    for _ in range(ATTEMPTS):
        asked.append(next(urls))
        try:
            stream = events(client, asked[-1], body, last)
            for number, (came, event) in enumerate(stream, start=1):
                last = came
                if event is None:
                    return text, usage, asked
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                text += "".join(choice["text"] for choice in event["choices"])
                usage = event.get("usage") or usage
                if number == break_after and len(asked) == 1:
                    break
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"no answer after {ATTEMPTS} attempts")


def main() -> None:
    """Asks each model in turn, over one growing text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--urls", nargs="+", default=["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
    )
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--models", nargs="+", default=["base", "family", "tools"])
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--break-after", type=int, default=0, help="events; 0: never")
    args = parser.parse_args()

    urls, prompt = itertools.cycle(args.urls), CONTEXT
    headers = {"Authorization": f"Bearer {args.api_key}"}
    with httpx.Client(headers=headers, timeout=120) as client:
        for model in args.models:
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": args.max_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            text, usage, asked = ask(client, urls, body, args.break_after)
            shared = usage["prompt_tokens_details"]["shared_tokens"]
            print(
                f"{model}: {shared} of {usage['prompt_tokens']} prompt tokens from another model, "
                f"{usage['completion_tokens']} tokens by {', '.join(asked)}: {text!r}"
            )
            prompt += text


if __name__ == "__main__":
    main()
