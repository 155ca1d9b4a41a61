"""The Grafana dashboard asks for nothing that the server does not publish."""

import json
import re
from pathlib import Path

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = json.loads(
    (Path(__file__).parents[2] / "deploy/grafana/pshare_jax.json").read_text(encoding="utf-8")
)
TARGETS = [
    (panel["title"], target["expr"], target["legendFormat"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]


@pytest.fixture
def published(client) -> dict[str, set[str]]:
    """Labels by the name of the sample."""
    client.complete()
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").body.decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def parsed(expression: str) -> tuple[list, set[str]]:
    """The selectors of an expression with Grafana's variables filled in, and what it groups by."""
    selectors, labels = [], set()

    def visit(node) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            selectors.append(node)
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            labels.update(node.modifier.labels)

    text = expression.replace("$__rate_interval", "5m").replace("$model", ".*")
    promql_parser.walk(promql_parser.parse(text), visit)
    return selectors, labels


def test_every_expression_finds_its_metrics_and_labels(published):
    assert len(TARGETS) > 20
    for title, expression, legend in TARGETS:
        selectors, grouped = parsed(expression)
        assert selectors, title
        for selector in selectors:
            assert selector.name in published, (title, selector.name)
            asked = {matcher.name for matcher in selector.matchers.matchers} | grouped
            asked |= set(re.findall(r"\{\{(\w+)\}\}", legend))
            assert asked <= published[selector.name], (title, selector.name, asked)


def test_panels_do_not_overlap_and_use_the_chosen_data_source():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)
