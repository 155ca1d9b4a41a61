"""A graph of LangGraph whose nodes are different models over one list of messages.

    make serve
    pip install langchain-openai langgraph
    python examples/langgraph_agents.py "Name a colour."

A writer answers, a critic comments, and the writer writes again, `--rounds` times. Both read the
same messages, so each call computes only what the one before it has added.
"""

from __future__ import annotations

import argparse

from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph


def node(args: argparse.Namespace, model: str, instruction: str):
    """A node that asks `model` to do `instruction` with the messages so far."""
    chat = ChatOpenAI(
        model=model,
        base_url=args.url,
        api_key=args.api_key,
        temperature=0,
        max_tokens=args.max_tokens,
    )

    def call(state: MessagesState) -> dict:
        asked = HumanMessage(instruction)
        reply = chat.invoke([*state["messages"], asked])
        usage = reply.usage_metadata
        cached = usage.get("input_token_details", {}).get("cache_read", 0)
        print(f"{model}: {cached} of {usage['input_tokens']} prompt tokens cached: {reply.text!r}")
        return {"messages": [asked, AIMessage(reply.text)]}

    return call


def main() -> None:
    """Builds the graph and runs it once."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", nargs="?", default="Name a colour, and why you like it.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--writer", default="base")
    parser.add_argument("--critic", default="family")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()

    def enough(state: MessagesState) -> str:
        # A task, and four messages a round.
        return END if len(state["messages"]) >= 1 + 4 * args.rounds else "writer"

    graph = StateGraph(MessagesState)
    graph.add_node("writer", node(args, args.writer, "Answer in one sentence."))
    graph.add_node("critic", node(args, args.critic, "What is wrong with that? One sentence."))
    graph.add_edge(START, "writer")
    graph.add_edge("writer", "critic")
    graph.add_conditional_edges("critic", enough)
    graph.compile().invoke({"messages": [HumanMessage(args.task)]})


if __name__ == "__main__":
    main()
