"""A running server with OpenAI's API answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from pshare_jax.errors import EvaluationError
from pshare_jax.evals.backend import Answer, OnAnswer, Sampling, chat_request
from pshare_jax.evals.items import Item
from pshare_jax.evals.verdict import shorten
from pshare_jax.frontend.tool_calls.syntax import tool_calls_text

_BUSY = {429, 502, 503, 504}
_MAX_WAIT_SECONDS = 60.0
_CONNECT_SECONDS = 10.0
_ERROR_CHARACTERS = 300


class ServerBackend:
    """Asks `POST /v1/chat/completions` of a server.

    Args:
        url: the server's, such as `http://127.0.0.1:8000`; a final `/v1` makes no difference.
        model: name of the model.
        concurrency: requests on their way at once; more than the server decodes at once, so that it
            has prompts to prefill meanwhile.
        api_key: sent as bearer token when it is not empty.
        attempts: how often a request is sent while the server is busy, unavailable or hangs up.
        timeout_seconds: how long the server may be silent.
        first_wait_seconds: after a first failed attempt; each further wait is twice as long, unless
            the server says how long to wait.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrency: int = 64,
        api_key: str = "",
        attempts: int = 8,
        timeout_seconds: float = 600.0,
        first_wait_seconds: float = 1.0,
    ):
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._concurrency = concurrency
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._attempts = attempts
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_SECONDS, sock_read=timeout_seconds
        )
        self._first_wait = first_wait_seconds

    def describe(self) -> dict[str, Any]:
        """The server's address, its entry of the model, and its version if it tells.

        Raises:
            EvaluationError: no server answers there, or it serves no such model.
        """
        return asyncio.run(self._describe())

    def answer(self, items: Sequence[Item], sampling: Sampling, on_answer: OnAnswer) -> None:
        """Answers all items, `concurrency` at a time; see `Backend`."""
        try:
            asyncio.run(self._answer_all(items, sampling, on_answer))
        except* EvaluationError as group:
            raise _first(group) from None

    async def _describe(self) -> dict[str, Any]:
        async with self._session() as http:
            models = await self._get(http, "/v1/models")
            if not isinstance(models, Mapping) or not isinstance(models.get("data"), list):
                raise EvaluationError(f"{self._url}/v1/models is no list of models")
            cards = {card.get("id"): card for card in models["data"] if isinstance(card, Mapping)}
            if self._model not in cards:
                served = ", ".join(map(str, cards))
                raise EvaluationError(
                    f"{self._url} serves no model {self._model!r}; there are {served}"
                )
            about = {"backend": "server", "url": self._url, "model_info": cards[self._model]}
            try:
                return {**about, "server_version": await self._get(http, "/version")}
            except EvaluationError:
                return about

    async def _get(self, http: aiohttp.ClientSession, path: str) -> Any:
        try:
            async with http.get(self._url + path) as response:
                text = await response.text()
                if response.status != 200:
                    raise EvaluationError(f"{self._url}{path}: {response.status}: {_message(text)}")
                return json.loads(text)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EvaluationError(
                f"{self._url} cannot be reached: {_reason(error)}; does the server run?"
            ) from error
        except ValueError as error:
            raise EvaluationError(f"{self._url}{path}: not valid JSON") from error

    async def _answer_all(
        self, items: Sequence[Item], sampling: Sampling, on_answer: OnAnswer
    ) -> None:
        waiting = iter(enumerate(items))

        async def work(http: aiohttp.ClientSession) -> None:
            for index, item in waiting:
                body = chat_request(self._model, item, sampling)
                on_answer(index, _answer(item, await self._ask(http, item, body)))

        # The first error ends all of them.
        async with self._session() as http, asyncio.TaskGroup() as group:
            for _ in range(min(self._concurrency, len(items))):
                group.create_task(work(http))

    async def _ask(self, http: aiohttp.ClientSession, item: Item, body: Mapping[str, Any]) -> Any:
        """The server's answer as JSON; asks again while that may help."""
        wait, problem = self._first_wait, ""
        for attempt in range(self._attempts):
            asked = None
            try:
                async with http.post(f"{self._url}/v1/chat/completions", json=body) as response:
                    text = await response.text()
                    if response.status == 200:
                        return json.loads(text)
                    problem = f"{response.status}: {_message(text)}"
                    if response.status not in _BUSY:
                        raise EvaluationError(f"item {item.id}: {self._url}: {problem}")
                    asked = _retry_after(response.headers.get("Retry-After"))
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = _reason(error)
            except ValueError as error:
                raise EvaluationError(
                    f"item {item.id}: {self._url}: the answer is not valid JSON"
                ) from error
            if attempt < self._attempts - 1:
                await asyncio.sleep(min(wait if asked is None else asked, _MAX_WAIT_SECONDS))
                wait *= 2
        raise EvaluationError(
            f"item {item.id}: {self._url}: no answer after {self._attempts} attempts: {problem}"
        )

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers=self._headers,
            timeout=self._timeout,
            connector=aiohttp.TCPConnector(limit=self._concurrency),
        )


def _answer(item: Item, body: Any) -> Answer:
    try:
        choice = body["choices"][0]
        message = choice["message"]
        calls = message.get("tool_calls")
        text = tool_calls_text(calls) if calls else message.get("content") or ""
        usage = body.get("usage") or {}
        return Answer(
            text,
            choice.get("finish_reason"),
            usage.get("prompt_tokens"),
            usage.get("completion_tokens"),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"item {item.id}: the server's answer is no chat completion: {shorten(str(body))}"
        ) from error


def _message(text: str) -> str:
    """The message of an error in OpenAI's shape, or the start of whatever came instead."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return shorten(text, _ERROR_CHARACTERS) or "no message"


def _retry_after(value: str | None) -> float | None:
    try:
        return max(float(value), 0.0) if value is not None else None
    except ValueError:  # an HTTP date
        return None


def _reason(error: BaseException) -> str:
    return shorten(str(error)) or type(error).__name__


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
