"""The tasks of the study: training, validation and test items, made from packages on PyPI.

Each task is three JSONL files that both the trainer and `pshare_jax.evals` read. No question of one
file is in another; for tool calls no *function* is, and for code no *program*. `tasks.json`, beside
the results, keeps the counts and hashes, and that the overlap was counted as zero.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pshare_jax.convert.files import replace_file
from pshare_jax.convert.manifest import read_json
from pshare_jax.errors import ConfigError, DataError
from pshare_jax.evals.items import file_sha256
from pshare_jax.study import programs, quick, relay, tools
from pshare_jax.study.config import TaskConfig

SPLITS = ("train", "validation", "test")
SUMMARY_FILE = "tasks.json"
TOOL_PARSER = "pythonic"
"""The form in which `tools` shows functions and wants calls, see `frontend/tool_prompt.py`."""

Item = dict[str, Any]
Sizes = tuple[int, int, int]
"""Items of the training, validation and test set."""

# reasoning-gym draws item i of a data set with seed + i: seeds of splits must lie far apart.
_SEEDS = {"train": 10_000_000, "validation": 20_000_000, "test": 30_000_000}


def _item(kind: str, question: str, answer: str, reference: Any, key: str) -> Item:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"kind": kind, "messages": messages, "reference": reference, "key": key}


def _reasoning_gym(name: str, seed: int, size: int) -> Iterator[dict[str, Any]]:
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise DataError(
            "the study's tasks need reasoning-gym: pip install 'pshare_jax[study]'"
        ) from error
    yield from reasoning_gym.create_dataset(name, seed=seed, size=size)


def _family(seed: int, size: int) -> Iterator[Item]:
    """How one member of a family is related to another: one word, worked out while reading."""
    for entry in _reasoning_gym("family_relationships", seed, size):
        question, answer = entry["question"], entry["answer"]
        yield _item("exact", question, answer, answer, question)


def _math(seed: int, size: int) -> Iterator[Item]:
    """Word problems after GSM8K, answered step by step; the last number counts."""
    for entry in _reasoning_gym("gsm_symbolic", seed, size):
        question, answer = entry["question"], str(entry["answer"])
        steps = entry["metadata"]["answer_cot"]
        if len(question) + len(steps) <= _MATH_CHARACTERS:
            yield _item("math", question, steps, answer, question)


_MATH_CHARACTERS = 700


def _code(seed: int, size: int) -> Iterator[Item]:
    """Short Python functions on lists of numbers, described in words and tested by examples."""
    for program in programs.generate(seed, size):
        reference = {"entry_point": programs.ENTRY_POINT, "tests": program.tests}
        yield _item("code", program.question, program.source, reference, program.key)


def _lookup(seed: int, size: int) -> Iterator[Item]:
    """What a tiny model with random weights can learn, see `quick`."""
    for question, answer in quick.lookups(seed, size):
        yield _item("exact", question, answer, answer, question)


def _relay(role: str, seed: int, size: int) -> Iterator[Item]:
    """A turn in a conversation of several modules, after the right answers of the others."""
    for one in relay.relays(seed, size):
        answer = one.answers[relay.ROLES.index(role)]
        yield {
            "kind": "exact",
            "messages": one.messages(role),
            "reference": answer,
            "key": one.questions[0],
        }


_GENERATED: dict[str, tuple[Callable[[int, int], Iterator[Item]], float]] = {
    # How many items to draw for each one that is kept, since duplicates are dropped.
    "family": (_family, 1.2),
    "math": (_math, 2.5),
    "code": (_code, 3.0),
    quick.TASK: (_lookup, 1.1),
    **{relay.task_of(r): (functools.partial(_relay, r), 1.1) for r in relay.ROLES},
}
TASKS = (*_GENERATED, "tools")


def _generated(task: str, sizes: Sizes) -> dict[str, list[Item]]:
    make, margin = _GENERATED[task]
    splits: dict[str, list[Item]] = {}
    seen: set[str] = set()
    # The test set is drawn first: what it holds is left out of the others.
    for split in reversed(SPLITS):
        size = sizes[SPLITS.index(split)]
        splits[split] = []
        for item in make(_SEEDS[split], int(size * margin) + 100):
            if len(splits[split]) == size:
                break
            if item["key"] not in seen:
                seen.add(item["key"])
                splits[split].append(item)
        if len(splits[split]) < size:
            raise DataError(f"{task}: {size} different {split} items are more than it can make")
    return splits


def _tools(sizes: Sizes) -> dict[str, list[Item]]:
    splits = tools.split_by_function(tools.load(), dict(zip(SPLITS, sizes, strict=True)))
    return {
        split: [
            _item("tools", call.question, call.answer, call.reference, call.question)
            | {"tools": call.functions}
            for call in calls
        ]
        for split, calls in splits.items()
    }


def overlap(splits: dict[str, list[Item]]) -> int:
    """How many keys (questions, programs) and, for tools, functions are in more than one split."""
    count = 0
    names: list[set[str]] = []
    for items in splits.values():
        keys = {item["key"] for item in items}
        keys |= {f"function {name}" for item in items for name in _functions(item)}
        count += sum(len(keys & other) for other in names)
        names.append(keys)
    return count


def _functions(item: Item) -> Iterable[str]:
    return (function["name"] for function in item.get("tools", []))


def make_task(task: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Writes a task's `train.jsonl`, `validation.jsonl` and `test.jsonl` to `folder`.

    Args:
        task: one of `TASKS`.
        sizes: items of each split; for tools the most there can be.
        folder: made if it does not exist.

    Returns:
        A JSON object: for each split the items `asked` for, `items` and `sha256`, and the `overlap`
        between splits: 0.

    Raises:
        ConfigError: there is no such task.
        DataError: fewer items can be made, a package is missing, or splits overlap.
    """
    if task not in TASKS:
        raise ConfigError(f"tasks: there is no task {task!r}; there are {', '.join(TASKS)}")
    splits = _tools(sizes) if task == "tools" else _generated(task, sizes)
    if shared := overlap(splits):
        raise DataError(f"{task}: {shared} keys are in more than one split")
    summary: dict[str, Any] = {"overlap": 0}
    for split, size in zip(SPLITS, sizes, strict=True):
        lines = []
        for index, item in enumerate(splits[split]):
            fields = {name: value for name, value in item.items() if name != "key"}
            lines.append(json.dumps({"id": f"{task}-{split}-{index}", **fields}) + "\n")
        content = "".join(lines)
        replace_file(folder / f"{split}.jsonl", content)
        digest = hashlib.sha256(content.encode()).hexdigest()
        summary[split] = {"asked": size, "items": len(lines), "sha256": digest}
    return summary


def plain_question(messages: Sequence[Mapping[str, Any]]) -> str:
    """What a base without a chat template is asked."""
    return "\n".join(message["content"] for message in messages) + "\nAnswer:"


def write_plain(items: Path, path: Path) -> None:
    """Writes the items of a file as prompts and completions, for a base without a template."""
    lines = []
    for line in items.read_text().splitlines():
        *asked, answer = json.loads(line)["messages"]
        record = {"prompt": plain_question(asked), "completion": f" {answer['content']}"}
        lines.append(json.dumps(record) + "\n")
    replace_file(path, "".join(lines))


def make_tasks(
    tasks: Iterable[TaskConfig], folder: Path, summary_path: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Makes the items of each task that are not there yet, and checks those that are.

    Args:
        tasks: what to make.
        folder: has a folder for each.
        summary_path: JSON file of what `make_task` gives for each: what results beside it are of.
        say: tells the user.

    Returns:
        What is in that file.

    Raises:
        ConfigError, DataError: as `make_task`; and items there are not those that are asked for.
    """
    summary = read_json(summary_path) if summary_path.is_file() else {}
    for task in tasks:
        sizes = (task.train, task.validation, task.test)
        items = folder / task.name
        known = summary.get(task.name)
        if known is not None:
            _check_sizes(task.name, sizes, known, items, summary_path)
        if known is not None and all((items / f"{split}.jsonl").is_file() for split in SPLITS):
            _check_files(known, items, summary_path)
            continue
        say(f"{task.name}: making its items")
        made = make_task(task.name, sizes, items)
        if summary.setdefault(task.name, made) != made:
            raise DataError(
                f"{items}: the items are not those of {summary_path}; results of both cannot "
                "be compared: remove the results, or install the packages they were made with"
            )
    replace_file(summary_path, json.dumps(summary, indent=1) + "\n")
    return summary


def _check_sizes(
    task: str, sizes: Sizes, known: Mapping[str, Any], items: Path, summary_path: Path
) -> None:
    for split, size in zip(SPLITS, sizes, strict=True):
        if (asked := known[split].get("asked")) != size:
            raise DataError(
                f"{summary_path}: {task}: {split} was made with {asked}, not {size}, and results "
                f"of both cannot be compared: remove {items} and {summary_path.parent} to make "
                "all anew, or name another folder and other results"
            )


def _check_files(known: Mapping[str, Any], items: Path, summary_path: Path) -> None:
    for split in SPLITS:
        if file_sha256(path := items / f"{split}.jsonl") != known[split]["sha256"]:
            raise DataError(
                f"{path}: is not the file whose hash {summary_path} keeps; remove {items} to "
                "have it made again"
            )
