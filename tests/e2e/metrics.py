"""Reading a server's `/metrics`."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[str, dict[tuple[str, ...], float]]


def read(url: str) -> Samples:
    """`{sample name: {label values: value}}`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return samples


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits until `condition` holds; to look takes a server some time, so that is done seldom.

    Raises:
        AssertionError: it still does not after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


def pages_in_use(url: str) -> float:
    """Pages of all pools that sequences hold."""
    pages = read(url)["pshare_pages"]
    return sum(value for labels, value in pages.items() if "used" in labels)
