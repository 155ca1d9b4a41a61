"""Log-probabilities of a prompt's own tokens: what the model would have generated in their place.

The log-probability of prompt token t is that with which the server generates it after the t tokens
before it: a prompt of its own, split by the model's rule, whose end the decode module reads itself.
So each position is asked for as exactly that: a *probe*, a request of one greedy token that a bias
forces to be token t. Probes share the pages of the prompt that they are beginnings of, so that the
prefill module computes nothing for them; a decode batch holds many.

The answer is generated first, since it brings the whole prompt into the cache, and is held back
until the scores are there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from pshare_jax.core.dispatcher import Dispatcher
from pshare_jax.core.models import ModelSpec
from pshare_jax.core.requests import (
    FinishReason,
    PromptUsage,
    Request,
    RequestOutput,
    RequestTimes,
    SamplingParams,
    TokenLogprobs,
)

FORCING_BIAS = 1e9
"""Makes a token the most likely one whatever the logits, in float32 too."""

_INTERNAL = "\0"
"""Begins the ids of requests that are made here; no client can choose such an id."""


def is_scored(params: SamplingParams) -> bool:
    """Whether a request goes by `PromptScorer`: prompt scores are asked for, or no token is."""
    return params.prompt_logprobs is not None or params.max_tokens == 0


def probe_of(request: Request, position: int, id: str) -> Request:
    """The request whose only token has the score of prompt token `position` (at least 1)."""
    prompt = request.prompt_token_ids
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logit_bias={prompt[position]: FORCING_BIAS},
        logprobs=request.params.prompt_logprobs,
        ignore_eos=True,
    )
    return msgspec.structs.replace(
        request, id=id, prompt_token_ids=prompt[:position], params=params, probe=True
    )


@dataclass(eq=False)
class _Scored:
    """A request that is being scored.

    `model` is what its model was when it came. `answer` is the id of the request that generates its
    answer, `held` what that has given so far, `unasked` the positions without a probe. `live` are
    the ids of all that has not ended; when none is left, `end` is delivered if it is set.
    """

    request: Request
    model: ModelSpec | None
    answer: str
    scores: list[TokenLogprobs | None]
    unasked: list[int] = field(default_factory=list[int])
    held: list[RequestOutput] = field(default_factory=list[RequestOutput])
    live: set[str] = field(default_factory=set[str])
    usage: PromptUsage | None = None
    times: RequestTimes | None = None
    begun: bool = False
    delivered: bool = False
    end: RequestOutput | None = None


class PromptScorer:
    """Requests with prompt scores, over a dispatcher.

    Args:
        dispatcher: takes the answer's request and the probes.
        window: most probes at a time, of all requests together; those take turns.
        next_order: arrival order of the next request.
    """

    def __init__(self, dispatcher: Dispatcher, window: int, next_order: Callable[[], int]):
        self._dispatcher = dispatcher
        self._window = window
        self._next_order = next_order
        self._requests: dict[str, _Scored] = {}
        self._owner: dict[str, _Scored] = {}
        self._probes: dict[str, int] = {}
        self._turns: deque[_Scored] = deque()
        self._serial = 0

    @property
    def num_probes(self) -> int:
        """Probes that have not ended."""
        return len(self._probes)

    def submit(
        self,
        request: Request,
        *,
        order: int,
        seed: int,
        end_token_ids: frozenset[int],
        now: float = 0.0,
    ) -> None:
        """Takes a request for which `is_scored` holds; otherwise as `Dispatcher.submit`."""
        model = self._dispatcher.hold(request.model)
        scored = _Scored(request, model, self._new_id(), [None] * len(request.prompt_token_ids))
        self._requests[request.id] = scored
        params = msgspec.structs.replace(
            request.params, max_tokens=max(request.params.max_tokens, 1), prompt_logprobs=None
        )
        # A token that nobody hears of is not what the next prompt goes on with.
        goes_on = request.goes_on and request.params.max_tokens > 0
        self._own(scored, scored.answer)
        self._dispatcher.submit(
            msgspec.structs.replace(request, id=scored.answer, params=params, goes_on=goes_on),
            order=order,
            seed=seed,
            end_token_ids=end_token_ids,
            model=model,
            now=now,
        )

    def abort(self, request_id: str) -> list[RequestOutput] | None:
        """Ends a request of this kind.

        Returns:
            What is to be delivered at once; None if there is no request of that id.
        """
        scored = self._requests.get(request_id)
        if scored is None:
            return None
        self._cancel(scored, RequestOutput(request_id, finish_reason=FinishReason.ABORT))
        return self._finish(scored)

    def fail_all(self, error: str) -> list[RequestOutput]:
        """Ends all requests with an error; what is to be delivered at once."""
        outputs: list[RequestOutput] = []
        for id, scored in tuple(self._requests.items()):
            end = RequestOutput(id, finish_reason=FinishReason.ERROR, error=error)
            self._cancel(scored, end)
            outputs += self._finish(scored)
        return outputs

    def take(self, output: RequestOutput) -> list[RequestOutput]:
        """What clients are to hear instead of an output of the dispatcher."""
        scored = self._owner.get(output.request_id)
        if scored is None:
            return [output]
        if output.finish_reason is not None:
            del self._owner[output.request_id]
            scored.live.discard(output.request_id)
        if output.request_id == scored.answer:
            heard = self._answered(scored, output)
        else:
            heard = self._probed(scored, output)
        self._ask()
        return heard + self._finish(scored)

    def _new_id(self) -> str:
        self._serial += 1
        return f"{_INTERNAL}{self._serial}"

    def _own(self, scored: _Scored, id: str) -> None:
        self._owner[id] = scored
        scored.live.add(id)

    def _answered(self, scored: _Scored, output: RequestOutput) -> list[RequestOutput]:
        """Takes an event of the answer in."""
        scored.usage = output.usage or scored.usage
        scored.times = output.times or scored.times
        if scored.end is not None:
            return []
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self._cancel(scored, msgspec.structs.replace(output, request_id=scored.request.id))
            return []
        if not scored.begun and output.token_ids:
            scored.begun = True
            if scored.request.params.prompt_logprobs is not None:
                # From the end: the pages there are the first to be given up.
                scored.unasked = list(range(1, len(scored.scores)))
                self._turns.append(scored)
        scored.held.append(msgspec.structs.replace(output, request_id=scored.request.id))
        return self._release(scored)

    def _probed(self, scored: _Scored, output: RequestOutput) -> list[RequestOutput]:
        """Takes an event of a probe in."""
        position = self._probes[output.request_id]
        if output.finish_reason is not None:
            del self._probes[output.request_id]
        if scored.end is not None:
            return []
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self._cancel(scored, msgspec.structs.replace(output, request_id=scored.request.id))
            return []
        scored.scores[position] = output.logprobs[0]
        return self._release(scored)

    def _release(self, scored: _Scored) -> list[RequestOutput]:
        """What has been held back, if the scores are complete."""
        asked_all = scored.begun and not scored.unasked
        if not asked_all or scored.live - {scored.answer}:
            return []
        outputs, scored.held = scored.held, []
        params, id = scored.request.params, scored.request.id
        scores = None if params.prompt_logprobs is None else tuple(scored.scores)
        if params.max_tokens == 0:
            # The one token of the answer was a way to have the prompt covered.
            scored.end = RequestOutput(
                id,
                usage=scored.usage,
                finish_reason=FinishReason.LENGTH,
                prompt_logprobs=scores,
                times=scored.times,
            )
            return []
        if not scored.delivered:
            scored.delivered = True
            outputs.insert(0, RequestOutput(id, prompt_logprobs=scores))
        return outputs

    def _ask(self) -> None:
        """Sends probes while there is room, one of each request in turn."""
        while self._turns and len(self._probes) < self._window:
            scored = self._turns.popleft()
            if not scored.unasked:
                continue
            position, id = scored.unasked.pop(), self._new_id()
            self._probes[id] = position
            self._own(scored, id)
            self._turns.append(scored)
            self._dispatcher.submit(
                probe_of(scored.request, position, id),
                order=self._next_order(),
                seed=0,
                end_token_ids=frozenset(),
                model=scored.model,
            )

    def _cancel(self, scored: _Scored, end: RequestOutput) -> None:
        """Gives a request up; `end` is delivered once nothing of it is left."""
        if scored.end is None:
            scored.end = end
        scored.unasked.clear()
        for id in scored.live:
            self._dispatcher.abort(id)

    def _finish(self, scored: _Scored) -> list[RequestOutput]:
        """The end of a request of which nothing is left."""
        id = scored.request.id
        if scored.live or self._requests.get(id) is not scored:
            return []
        if scored.end is None and not (scored.delivered and not scored.held):
            return []
        del self._requests[id]
        if scored.model is not None:
            self._dispatcher.release(scored.model)
        return [] if scored.end is None else [scored.end]
