"""A teacher behind a server with OpenAI's API: its answers become examples to learn from.

Only its texts are known, so that the student learns them by cross-entropy (sequence-level
distillation, Kim and Rush, arXiv 1606.07947). Each answer is kept as soon as it is there: a run
that goes on asks for nothing twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import aiohttp

from pshare_jax.convert.files import one_line, replace_file
from pshare_jax.errors import TrainingError
from pshare_jax.text.tools import in_openai_form
from pshare_jax.train.config import DistillConfig
from pshare_jax.train.conversation import LineError
from pshare_jax.train.data import CUT, lacks_answer, parse_line, read_lines
from pshare_jax.train.report import Reporter

ANSWERS_FILE = "answers-of-server.jsonl"
KEY_VARIABLE = "OPENAI_API_KEY"
_TITLE = "answers of the teacher"
_BUSY = {408, 429, 500, 502, 503, 504}
_ATTEMPTS = 6
_FIRST_WAIT_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 600.0
_NOT_SENT = {"weight", "train", "loss"}

Answer = dict[str, Any]
"""`message` (of the assistant) or `text`, and `cut`: whether it came to no end."""


class EndpointTeacher:
    """Asks a server for the answers that lines of data lack.

    Args:
        config: the server's URL and the model's name.
        folder: the run folder, where answers are kept.
        reporter: shows progress.
    """

    def __init__(self, config: DistillConfig, folder: Path, reporter: Reporter):
        self._config = config
        self._url = config.teacher.rstrip("/").removesuffix("/v1")
        self._path = folder / ANSWERS_FILE
        self._reporter = reporter
        self._answers: dict[str, Answer] = {}
        self.total = self.empty = self.cut = 0
        """Answers that `complete` was asked for, and how many of them are empty or cut off."""

    def load(self) -> None:
        """Reads the answers that are kept."""
        self._answers = self._kept()

    def ask(self, paths: Sequence[str]) -> None:
        """Makes sure that there is an answer to every line of the files `paths` that lacks one.

        Raises:
            TrainingError: the server does not answer; the message has its own words.
            DataError: a file cannot be read.
        """
        self.load()
        missing = {
            key: question
            for question in _questions(paths)
            if (key := _key(self._config, question)) not in self._answers
        }
        if not missing:
            return
        self._reporter.start(_TITLE, len(missing))
        # A kill may have left half a line, which the next would be written behind.
        replace_file(self._path, "".join(_line(*entry) for entry in self._answers.items()))
        try:
            with self._path.open("a", buffering=1) as file:
                asyncio.run(self._ask_all(missing, file))
        except* TrainingError as group:
            raise _first(group) from None
        finally:
            self._reporter.stop()

    def complete(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """`record` with the answer that it lacks; as it is when it has one, and None when the
        teacher's is empty."""
        if not lacks_answer(record):
            return record
        answer = self._answers.get(_key(self._config, _question(record)))
        if answer is None:
            raise LineError("the teacher was not asked", "no answer")
        self.total += 1
        self.cut += answer["cut"]
        if _is_empty(answer):
            self.empty += 1
            return None
        cut = {CUT: True} if answer["cut"] else {}
        if "messages" in record:
            return {**record, "messages": [*record["messages"], answer["message"]], **cut}
        return {**record, "completion": answer["text"], **cut}

    def _kept(self) -> dict[str, Answer]:
        """What earlier starts have asked; half a line that a kill has left is dropped."""
        kept: dict[str, Answer] = {}
        try:
            lines = self._path.read_text(errors="replace").splitlines()
        except OSError:
            return kept
        for line in lines:
            try:
                entry = json.loads(line)
                kept[entry["key"]] = entry["answer"]
            except (ValueError, TypeError, KeyError):
                continue
        return kept

    async def _ask_all(self, missing: Mapping[str, Mapping[str, Any]], file: TextIO) -> None:
        key = os.environ.get(KEY_VARIABLE, "")
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_SECONDS, sock_read=_ANSWER_SECONDS
        )
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        waiting = iter(missing.items())
        done = 0
        async with aiohttp.ClientSession(timeout=timeout, headers=headers) as http:

            async def work() -> None:
                nonlocal done
                for name, question in waiting:
                    answer = await self._ask_one(http, question)
                    self._answers[name] = answer
                    file.write(_line(name, answer))
                    done += 1
                    self._reporter.advance(_TITLE, done, len(missing))

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._config.concurrency, len(missing))):
                    group.create_task(work())

    async def _ask_one(self, http: aiohttp.ClientSession, question: Mapping[str, Any]) -> Answer:
        """Asks until there is an answer, or the server will not give one.

        Raises:
            TrainingError: it does not.
        """
        is_chat = "messages" in question
        url = f"{self._url}/v1/{'chat/completions' if is_chat else 'completions'}"
        body = {
            "model": self._config.model,
            "temperature": 0,
            "max_tokens": self._config.max_tokens,
            **question,
        }
        wait = _FIRST_WAIT_SECONDS
        problem = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(wait)
                wait *= 2
            try:
                async with http.post(url, json=body) as response:
                    text = await response.text()
                    if response.status == 200:
                        return _answer(json.loads(text), is_chat)
                    problem = f"{response.status} {text[:300]}"
                    if response.status not in _BUSY:
                        break
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = one_line(error)
            except (ValueError, LookupError, TypeError) as error:
                problem = f"not an answer of OpenAI's API: {one_line(error)}"
                break
        raise TrainingError(
            f"distill.teacher: {url}: {problem}; what was answered is kept: start again to go on"
        )


def _line(key: str, answer: Answer) -> str:
    return json.dumps({"key": key, "answer": answer}) + "\n"


def _questions(paths: Sequence[str]) -> list[dict[str, Any]]:
    """What the lines that lack an answer ask; lines that are no JSON are left to the reader."""
    questions = []
    for path in paths:
        for _, line in read_lines(path, hashlib.sha256()):
            try:
                record = parse_line(line)
            except LineError:
                continue
            if lacks_answer(record):
                questions.append(_question(record))
    return questions


def _question(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a request that is the line's."""
    if "messages" not in record:
        return {"prompt": record["prompt"]}
    messages = [
        {name: value for name, value in message.items() if name not in _NOT_SENT}
        if isinstance(message, dict)
        else message
        for message in record["messages"]
    ]
    tools = record.get("tools")
    if not isinstance(tools, list) or not tools:
        return {"messages": messages}
    return {"messages": messages, "tools": [in_openai_form(tool) for tool in tools]}


def _key(config: DistillConfig, question: Mapping[str, Any]) -> str:
    facts = [config.model, config.max_tokens, question]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _answer(body: Mapping[str, Any], is_chat: bool) -> Answer:
    choice = body["choices"][0]
    cut = choice.get("finish_reason") == "length"
    if not is_chat:
        return {"text": choice["text"], "cut": cut}
    given = choice["message"]
    message = {"role": "assistant", "content": given.get("content") or ""}
    for name in ("tool_calls", "reasoning_content"):
        if given.get(name):
            message[name] = given[name]
    return {"message": message, "cut": cut}


def _is_empty(answer: Answer) -> bool:
    if "text" in answer:
        return not answer["text"].strip()
    message = answer["message"]
    return not message["content"].strip() and not message.get("tool_calls")


def _first(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
