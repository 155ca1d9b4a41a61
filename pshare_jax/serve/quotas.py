"""What each API key has used, and whether it may have more: token buckets, and requests at once.

A bucket holds what a minute allows, and fills at that rate. Times are in seconds of any one clock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from pshare_jax.serve.api_keys import ApiKey
from pshare_jax.serve.errors import ApiError

_SMOOTHING = 0.2
_FIRST_GUESS_SECONDS = 1.0


class Bucket:
    """Allows `per_minute` of something a minute, at once or evenly.

    It may be overdrawn by what turns out later; then it first has to fill up again.
    """

    def __init__(self, per_minute: int, now: float):
        self.capacity = per_minute
        self._level = float(per_minute)
        self._now = now

    def level(self, now: float) -> float:
        """What is left; negative when it is overdrawn."""
        fresh = (now - self._now) * self.capacity / 60
        self._level = min(self.capacity, self._level + max(fresh, 0.0))
        self._now = max(now, self._now)
        return self._level

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there; 0 when it is."""
        return max(0.0, (amount - self.level(now)) * 60 / self.capacity)

    def take(self, amount: float, now: float) -> None:
        """Takes `amount`, whether it is there or not; a negative one is given back."""
        self._level = min(self.capacity, self.level(now) - amount)


@dataclass
class Charge:
    """What a request costs: reserved at first, then `prompt` and `generated` tokens as they are."""

    prompt: int
    generated: int = 0
    started: bool = False


class Account:
    """One key's use of the server. Belongs to one event loop.

    Attributes:
        key: whose.
        running: requests at this moment.
        requests: requests that were let in.
        refused: those that were not, by the limit that was met.
        prompt_tokens: of requests that were started.
        generated_tokens: of all requests.
    """

    def __init__(self, key: ApiKey, clock: Callable[[], float]):
        self.key = key
        self.running = 0
        self.requests = 0
        self.refused: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self._clock = clock
        self._mean_seconds = _FIRST_GUESS_SECONDS
        self._request_bucket = self._bucket(key.requests_per_minute)
        self._token_bucket = self._bucket(key.tokens_per_minute)

    def change(self, key: ApiKey) -> None:
        """The key has other limits from now on; what it has used of unchanged ones counts on."""
        old, self.key = self.key, key
        if old.requests_per_minute != key.requests_per_minute:
            self._request_bucket = self._bucket(key.requests_per_minute)
        if old.tokens_per_minute != key.tokens_per_minute:
            self._token_bucket = self._bucket(key.tokens_per_minute)

    @contextmanager
    def request(self) -> Generator[None]:
        """A request of the key, as long as it runs.

        Raises:
            ApiError: 429, the key has too many, now or in this minute.
        """
        began, bucket, most = self._clock(), self._request_bucket, self.key.max_concurrent
        if bucket is not None and (wait := bucket.wait(1, began)):
            raise self._refusal("requests", f"{bucket.capacity} requests a minute", wait)
        if most is not None and self.running >= most:
            wait = self._mean_seconds / self.running
            raise self._refusal("concurrent", f"{most} requests at once", wait)
        if bucket is not None:
            bucket.take(1, began)
        self.requests += 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._mean_seconds += _SMOOTHING * (self._clock() - began - self._mean_seconds)

    @contextmanager
    def charge(self, prompt: int, most_generated: int) -> Generator[Charge]:
        """The tokens of a request: as many as it may take are reserved until it has ended.

        One that may take more than a minute allows needs all of that minute, and what it takes
        beyond is made up for afterwards.

        Args:
            prompt: tokens of its prompts.
            most_generated: tokens that it may generate.

        Raises:
            ApiError: 429, the key has used its tokens of this minute.
        """
        bucket, now, charge = self._token_bucket, self._clock(), Charge(prompt)
        reserved = 0
        if bucket is not None:
            reserved = min(prompt + most_generated, bucket.capacity)
            if wait := bucket.wait(reserved, now):
                raise self._refusal(
                    "tokens", f"{bucket.capacity} tokens a minute; this needs {reserved}", wait
                )
            bucket.take(reserved, now)
        try:
            yield charge
        finally:
            used = charge.prompt + charge.generated if charge.started else 0
            if bucket is not None:
                bucket.take(used - reserved, self._clock())
            if charge.started:
                self.prompt_tokens += charge.prompt
                self.generated_tokens += charge.generated

    def headers(self) -> dict[str, str]:
        """What OpenAI's `x-ratelimit` headers say of the limits that there are."""
        now = self._clock()
        headers: dict[str, str] = {}
        for name, bucket in [("requests", self._request_bucket), ("tokens", self._token_bucket)]:
            if bucket is not None:
                left = max(0, math.floor(bucket.level(now)))
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
                headers[f"x-ratelimit-remaining-{name}"] = str(left)
                headers[f"x-ratelimit-reset-{name}"] = _duration(bucket.wait(bucket.capacity, now))
        return headers

    def _bucket(self, per_minute: int | None) -> Bucket | None:
        return None if per_minute is None else Bucket(per_minute, self._clock())

    def _refusal(self, limit: str, allowed: str, wait: float) -> ApiError:
        self.refused[limit] += 1
        seconds = max(1, math.ceil(wait))
        return ApiError(
            429,
            f"key {self.key.name!r} is limited to {allowed}; try again in {seconds} s",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(seconds)},
        )


def _duration(seconds: float) -> str:
    """As OpenAI writes it: `17ms`, `1.2s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{math.ceil(rest)}s" if minutes else f"{rest:.1f}s"
