"""DSPy: signatures by its own format and by a schema, and an agent with a tool."""

from __future__ import annotations

from told import URL, tell  # isort: skip

import dspy


class Question(dspy.Signature):
    """Answer."""

    question: str = dspy.InputField()
    city: str = dspy.OutputField()
    count: int = dspy.OutputField()


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


lm = dspy.LM("openai/planner", api_base=URL, api_key="none", cache=False, num_retries=0)
results = {}
for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter()):
    with dspy.context(lm=lm, adapter=adapter):
        answer = dspy.Predict(Question)(question="which?")
        results[type(adapter).__name__] = [answer.city, answer.count]
with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
    agent = dspy.ReAct("question -> answer", tools=[get_weather], max_iters=2)
    answer = agent(question="weather?")
    results["agent"] = [answer.answer, answer.trajectory["observation_0"]]
tell(**results)
