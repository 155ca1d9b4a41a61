"""The OpenAI Agents SDK: a planner, a writer and a critic, each served by another decode module.

    make serve
    pip install openai-agents
    python examples/openai_agents.py "A day in Lisbon"

Each agent gets the conversation of those before it, so its prompt begins with what they have
computed. Instructions stand in the conversation, not in a system message of each agent: a system
message comes first, and one that differs leaves nothing to share.
"""

from __future__ import annotations

import argparse
import asyncio

import agents
import openai

STEPS = {
    "planner": "Make a plan in three points.",
    "writer": "Write it in a paragraph.",
    "critic": "Name its weakest point in a sentence.",
}


async def main() -> None:
    """Runs the three agents over one conversation."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", nargs="?", default="A day in Lisbon")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--models", nargs=3, default=["base", "family", "code"])
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    agents.set_tracing_disabled(True)  # traces would go to OpenAI
    settings = agents.ModelSettings(max_tokens=args.max_tokens, temperature=0)
    conversation = [{"role": "user", "content": args.task}]
    async with openai.AsyncOpenAI(base_url=args.url, api_key=args.api_key) as client:
        for (name, instruction), served in zip(STEPS.items(), args.models, strict=True):
            model = agents.OpenAIChatCompletionsModel(model=served, openai_client=client)
            agent = agents.Agent(name, model=model, model_settings=settings)
            conversation.append({"role": "user", "content": instruction})
            result = await agents.Runner.run(agent, conversation)
            conversation = result.to_input_list()
            usage = result.context_wrapper.usage
            cached = usage.input_tokens_details.cached_tokens
            print(f"{name} ({served}), {cached} of {usage.input_tokens} prompt tokens cached:")
            print(f"  {result.final_output!r}")


if __name__ == "__main__":
    asyncio.run(main())
