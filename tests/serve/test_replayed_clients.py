"""What clients send that are no Python packages: their requests, in the shapes they send them in.

Codex and opencode come from npm, Claude Code and the AI SDK too, and GuideLLM brings torch.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from pshare_jax.config import ModelEntry
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import Client, running_server
from tests.serve.test_completions import script
from tests.serve.test_tools import ARGUMENTS, CALL, TEMPLATE
from tests.text.tiny import write_byte_level

SHELL = {
    "type": "object",
    "properties": {
        "command": {"type": "array", "items": {"type": "string"}, "description": "The command"},
        "workdir": {"type": "string"},
        "timeout_ms": {"type": "number"},
    },
    "required": ["command"],
    "additionalProperties": False,
}
RUN = '<tool_call>\n{"name": "shell", "arguments": {"command": ["ls"]}}\n</tool_call>'


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path_factory.mktemp("replayed"), TEMPLATE))
    models = [ModelEntry("planner"), ModelEntry("coder", reasoning="off")]
    config = dataclasses.replace(fake_config(max_model_len=8192), models=models)
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client


def events(answer) -> list[tuple[str, dict]]:
    """Names and data of a stream's events."""
    assert answer.status == 200, answer.body
    found = []
    for block in answer.body.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if lines.get("data", "[DONE]") != "[DONE]":
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found


def prompt(client: Client) -> str:
    return client.engine.tokenizer.decode(client.engine.submitted[-1].prompt_token_ids)


def codex(*items: dict) -> dict:
    """Codex 0.171 by a provider of `wire_api = "responses"`."""
    return {
        "model": "planner",
        "instructions": "You are a coding agent running in the Codex CLI.",
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "<permissions>read-only</permissions>"}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "<environment_context/>"},
                    {"type": "input_text", "text": "list the files"},
                ],
            },
            *items,
        ],
        "tools": [
            {
                "type": "function",
                "name": "shell",
                "description": "Runs a shell command and returns its output.",
                "strict": False,
                "parameters": SHELL,
            },
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "019a0000-0000-7000-8000-000000000000",
        "text": {"verbosity": "medium"},
        "client_metadata": {"x-codex-installation-id": "none"},
    }


def test_codex(client):
    """A call, then its result goes back with the thoughts before it."""
    script(client.engine, f"<think>\nI list.\n</think>\n\n{RUN}")
    first = events(client.post("/v1/responses", codex(), session_id="019a"))
    kinds = [name for name, _ in first]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert [data["sequence_number"] for _, data in first] == list(range(len(first)))
    done = [data["item"] for name, data in first if name == "response.output_item.done"]
    assert [item["type"] for item in done] == ["reasoning", "function_call"]
    assert (done[1]["name"], done[1]["arguments"]) == ("shell", '{"command": ["ls"]}')
    response = first[-1][1]["response"]
    assert response["id"].startswith("resp")
    assert response["usage"]["total_tokens"] > 0
    assert {"input_tokens_details", "output_tokens_details"} < set(response["usage"])
    script(client.engine, "There is one file.")
    output = json.dumps({"output": "a.py\n", "metadata": {"exit_code": 0}})
    again = codex(
        {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None},
        {k: done[1][k] for k in ("type", "name", "arguments", "call_id")},
        {"type": "function_call_output", "call_id": done[1]["call_id"], "output": output},
    )
    second = events(client.post("/v1/responses", again))
    text = "".join(d["delta"] for name, d in second if name == "response.output_text.delta")
    assert text == "There is one file."
    assert "a.py" in prompt(client)


def test_codex_compacts_and_shows_pictures_of_results(client):
    """A result as a list of parts, and a user's turn after an answer."""
    script(client.engine, "ok")
    items = (
        {"type": "function_call", "name": "shell", "arguments": "{}", "call_id": "c1"},
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": "seen"}],
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Done."}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "more"}]},
    )
    assert events(client.post("/v1/responses", codex(*items)))[-1][0] == "response.completed"
    assert prompt(client).index("seen") < prompt(client).index("Done.")


def ai_sdk(**fields: object) -> dict:
    """opencode 1.18, by `@ai-sdk/openai-compatible`."""
    return {
        "model": "planner",
        "max_tokens": 4096,
        "temperature": 0,
        "messages": [
            {"role": "system", "content": "You are opencode."},
            {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "The weather.",
                    "parameters": {
                        "$schema": "http://json-schema.org/draft-07/schema#",
                        "type": "object",
                        "properties": {"city": {"type": "string"}},
                        "required": ["city"],
                        "additionalProperties": False,
                    },
                },
            }
        ],
        "tool_choice": "auto",
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


def test_opencode(client):
    script(client.engine, CALL)
    chunks = [data for _, data in events(client.post("/v1/chat/completions", ai_sdk()))]
    deltas = [c for chunk in chunks for choice in chunk["choices"] for c in [choice["delta"]]]
    calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    # The SDK wants id, type and name in the first of a call.
    assert {"id", "type", "function"} <= set(calls[0])
    assert calls[0]["function"]["name"] == "get_weather"
    assert "".join(call["function"].get("arguments", "") for call in calls) == ARGUMENTS
    assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"]][-1] == "tool_calls"
    assert chunks[-1]["usage"]["total_tokens"] > 0
    script(client.engine, "Sunny.")
    again = ai_sdk()
    again["messages"] += [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": calls[0]["id"],
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": ARGUMENTS},
                }
            ],
        },
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "sunny"},
    ]
    chunks = [data for _, data in events(client.post("/v1/chat/completions", again))]
    text = "".join(c["delta"].get("content") or "" for ch in chunks for c in ch["choices"])
    assert text == "Sunny."


def test_the_ai_sdk_asks_for_objects(client):
    """`generateObject`, whose schema has a `$schema` of its own."""
    script(client.engine, '{"city": "Paris"}')
    body = ai_sdk(
        model="coder",
        stream=False,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "response",
                "strict": True,
                "schema": ai_sdk()["tools"][0]["function"]["parameters"],
            },
        },
    )
    del body["tools"], body["tool_choice"], body["stream_options"]
    answer = client.post("/v1/chat/completions", body)
    assert json.loads(answer.json["choices"][0]["message"]["content"]) == {"city": "Paris"}


def claude_code(**fields: object) -> dict:
    """Claude Code, by ANTHROPIC_BASE_URL."""
    cached = {"cache_control": {"type": "ephemeral"}}
    return {
        "model": "planner",
        "max_tokens": 32000,
        "system": [
            {"type": "text", "text": "You are Claude Code.", **cached},
            {"type": "text", "text": "Be brief.", **cached},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>today</system-reminder>"},
                    {"type": "text", "text": "weather?", **cached},
                ],
            }
        ],
        "tools": [
            {
                "name": "get_weather",
                "description": "The weather.",
                "input_schema": ai_sdk()["tools"][0]["function"]["parameters"],
                **cached,
            }
        ],
        "thinking": {"type": "enabled", "budget_tokens": 31999},
        "context_management": {"edits": []},
        "output_config": {"effort": "medium"},
        "metadata": {"user_id": "user_0_account__session_0"},
        "temperature": 1,
        "stream": True,
        **fields,
    }


CLAUDE = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    "x-app": "cli",
    "anthropic-dangerous-direct-browser-access": "true",
}


def test_claude_code(client):
    script(client.engine, f"I look.\n{CALL}")
    told = events(client.post("/v1/messages?beta=true", claude_code(), **CLAUDE))
    names = [name for name, _ in told if name != "ping"]
    assert (names[0], names[-1]) == ("message_start", "message_stop")
    starts = [d["content_block"] for name, d in told if name == "content_block_start"]
    assert [block["type"] for block in starts] == ["text", "tool_use"]
    pieces = [d["delta"] for name, d in told if name == "content_block_delta"]
    assert "".join(p.get("partial_json", "") for p in pieces) == ARGUMENTS
    ends = [d["delta"]["stop_reason"] for name, d in told if name == "message_delta"]
    assert ends == ["tool_use"]
    script(client.engine, "Sunny.")
    again = claude_code(stream=False)
    again["messages"] += [
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": starts[1]["id"], "name": "get_weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": starts[1]["id"],
                    "content": [{"type": "text", "text": "sunny"}],
                    "is_error": False,
                    "cache_control": {"type": "ephemeral"},
                }
            ],
        },
    ]
    answer = client.post("/v1/messages?beta=true", again, **CLAUDE)
    assert answer.json["content"] == [{"type": "text", "text": "Sunny."}]
    counted = {k: again[k] for k in ("model", "system", "messages", "tools")}
    answer = client.post("/v1/messages/count_tokens?beta=true", counted, **CLAUDE)
    assert answer.json["input_tokens"] == len(client.engine.submitted[-1].prompt_token_ids)


@pytest.mark.parametrize("chat", [False, True])
def test_guidellm(client, chat):
    """GuideLLM 0.8: usage in every chunk, and as many tokens as it says."""
    script(client.engine, "x", end=False)
    assert client.get("/health").status == 200
    content = [{"type": "text", "text": "hi"}]
    what = {"messages": [{"role": "user", "content": content}]} if chat else {"prompt": "hi"}
    limit = {"max_completion_tokens": 8} if chat else {"max_tokens": 8}
    body = {
        "model": client.get("/v1/models").json["data"][0]["id"],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "stop": None,
        "ignore_eos": True,
        **limit,
        **what,
    }
    path = "/v1/chat/completions" if chat else "/v1/completions"
    chunks = [data for _, data in events(client.post(path, body))]
    assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in chunks)
    assert chunks[-1]["usage"]["completion_tokens"] == 8
