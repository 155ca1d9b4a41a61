"""What all programs share: whom they ask, and how they tell what they got."""

from __future__ import annotations

import json
import os
import sys

# None of them may tell others of itself, or ask others for news.
os.environ.update(
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    DO_NOT_TRACK="1",
    OTEL_SDK_DISABLED="true",
    CREWAI_DISABLE_TELEMETRY="true",
    CREWAI_TRACING_ENABLED="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    NO_COLOR="1",
)

URL, FOLDER = sys.argv[1:3]
"""The server's address up to `/v1`, and a folder of the program's own."""

USER = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS},
}


def tell(**results: object) -> None:
    """Writes what was got: the last line of the output that is a JSON object."""
    print("\n" + json.dumps(results))
