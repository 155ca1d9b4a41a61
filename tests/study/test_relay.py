"""Modules that answer each other: who sees what, and how it is counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pshare_jax.errors import ConfigError
from pshare_jax.evals.items import Item, parse_item
from pshare_jax.study import runner
from pshare_jax.study.config import StudyConfig, TaskConfig, Team
from pshare_jax.study.relay import ROLES, play, relays, task_of
from pshare_jax.study.report import read_results, read_teams
from pshare_jax.study.runner import Study
from pshare_jax.study.tasks import make_task
from pshare_jax.study.teams import team_table
from pshare_jax.train.report import Reporter
from tests.study.test_settings import Trainer, named


def test_answers_follow_from_the_answers_before():
    for one in relays(1, 50):
        stock = {
            part.split()[1]: int(part.split()[0])
            for part in one.questions[0].removeprefix("The shop has ").split(".")[0].split(", ")
        }
        thing, count, left, more = one.answers
        assert stock[thing] == max(stock.values()) == int(count)
        sold = int(one.questions[2].split()[2])
        assert int(left) == int(count) - sold >= 0
        other = one.questions[3].split("number of ")[1].split()[0]
        assert more == ("yes" if int(left) > stock[other] else "no")
    assert list(relays(1, 5)) == list(relays(1, 5)) != list(relays(2, 5))


def test_a_role_is_trained_on_its_own_turn_alone():
    one = next(relays(3, 1))
    for place, role in enumerate(ROLES):
        messages = one.messages(role)
        assert [m["content"] for m in messages[1::2]] == list(one.answers[: place + 1])
        assert [m.get("weight") for m in messages[1::2]] == [0] * place + [None]


def last_items(count: int) -> list[Item]:
    found = []
    for number, one in enumerate(relays(5, count)):
        record = {"id": str(number), "kind": "exact", "reference": one.answers[-1]}
        found.append(parse_item(json.dumps({**record, "messages": one.messages(ROLES[-1])})))
    return found


def test_each_sees_what_the_others_really_said():
    items = last_items(3)
    gold = {item.id: item.reference for item in items}
    seen: dict[str, list] = {}

    def answer(role, asked):
        seen[role] = [item.messages for item in asked]
        return ["wrong" if role == "count" else item.reference for item in asked]

    right = play(items, gold, answer)
    assert right == {
        "find": [True] * 3,
        "count": [False] * 3,
        "change": [True] * 3,
        "compare": [True] * 3,
    }
    for messages, item in zip(seen["compare"], items, strict=True):
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        assert said == [item.messages[1]["content"], "wrong", item.messages[5]["content"]]
        assert messages[-1] == item.messages[-1]
        assert "weight" not in str(messages)


@pytest.fixture
def config(tmp_path, monkeypatch) -> StudyConfig:
    monkeypatch.setattr(runner, "run_trainer", Trainer())
    monkeypatch.setattr(runner, "read_manifest", named)
    monkeypatch.setattr(Study, "_evaluate", lambda self, *_: {"accuracy": 1.0, "correct": "1"})
    return StudyConfig(
        base="b0",
        folder=str(tmp_path / "work"),
        results=str(tmp_path / "results"),
        tasks=[TaskConfig(task_of(role), 24, 4, 6, 4) for role in ROLES],
        runs=[],
        teams=[Team("lora", 8, 1e-3, tail=32), Team("ordinary-lora", 8, 1e-3)],
        batch_size=4,
        lora_rank=2,
    )


def test_a_team_is_trained_and_plays_in_each_way(config, monkeypatch):
    asked = []

    def texts(self, module, items, share, tail):
        asked.append((module.parent.name, share, tail))
        return [item.reference for item in items]

    monkeypatch.setattr(Study, "_texts", texts)
    Study(config, Reporter(active=False)).make()
    results = Path(config.results)
    shared = json.loads((results / "relay-lora-tail32-0.001-8-0.json").read_text())
    assert shared["modes"].keys() == {"shared"}
    assert shared["modes"]["shared"]["turns"]["all turns"]["accuracy"] == 1
    own = json.loads((results / "relay-ordinary-lora-0.001-8-0.json").read_text())
    assert own["modes"].keys() == {"isolated", "naive"}
    assert asked[0] == ("relay-find-lora-tail32-0.001-8-0", None, 32)
    assert {share for name, share, _ in asked if "ordinary" in name} == {0.0, 1.0}
    # They are no results of single tasks; and nothing is made twice.
    assert len(read_teams(results)) == 2
    assert all("evaluations" in result for result in read_results(results))
    before = len(asked)
    Study(config, Reporter(active=False)).make()
    assert len(asked) == before
    text = team_table(read_teams(results))
    row = "| PrefillShare, LoRA, tail 32 | shared | 8 | 1 |" + " 100.0 (61.0 to 100.0) |" * 5
    assert row in text
    assert "not measured yet" in team_table([])


def test_a_team_needs_the_tasks_of_its_roles(config):
    with pytest.raises(ConfigError, match="there is no task 'relay-find'"):
        dataclasses.replace(config, tasks=[TaskConfig("code", 24, 4, 6, 4)])


def test_all_roles_have_the_same_conversations(tmp_path):
    for role in ROLES:
        make_task(task_of(role), (6, 2, 3), tmp_path / role)
    for split in ("train", "test"):
        files = [(tmp_path / role / f"{split}.jsonl").read_text().splitlines() for role in ROLES]
        for lines in zip(*files, strict=True):
            first = {json.loads(line)["messages"][0]["content"] for line in lines}
            assert len(first) == 1
