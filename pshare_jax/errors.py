"""The exceptions a caller can act on. Each message says what was wrong, where, and what to do."""

from __future__ import annotations

import re

MAX_MESSAGE = 2000
"""Characters of a message: names that come from a file can be of any length."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys instead of showing it, what reverses the text, and lone surrogates."""


def printable(text: str) -> str:
    r"""`text` as it may go to a terminal or a log: control characters become `\x1b` and the like.

    Whatever a file names (tensors, metadata, tokens) may hold escape codes. Newlines and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class PshareError(Exception):
    """Base of every error that this package raises on purpose.

    Its text is printable, and its middle is left out where it is very long.
    """

    def __str__(self) -> str:
        text = printable(super().__str__())
        if len(text) <= MAX_MESSAGE:
            return text
        return f"{text[: MAX_MESSAGE // 2]} [...] {text[-MAX_MESSAGE // 4 :]}"


class ConfigError(PshareError):
    """A configuration that cannot be served; the message names the key."""


class MissingExtraError(PshareError):
    """A command needs packages of an extra that is not installed; the message names the extra."""


class DataError(PshareError):
    """Data to train or evaluate with that cannot be used; the message names file and line."""


class TrainingError(PshareError):
    """A training run that cannot go on."""


class EvaluationError(PshareError):
    """An evaluation that cannot go on, or results that cannot be compared."""


class CheckpointError(PshareError):
    """A checkpoint or model file that cannot be used; the message names file and tensor."""


class CertificateError(CheckpointError):
    """A decode module whose certificate does not fit the base it is loaded beside."""


class RequestError(PshareError):
    """A request that can never be served; `param` names the offending field, if one does."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModelError(RequestError):
    """The request names a model that is not served."""


class QueueFullError(PshareError):
    """The engine's waiting queue is at its limit; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(PshareError):
    """An engine thread has failed; nothing more can be served until a restart."""


class GangLostError(PshareError):
    """A process of a mesh over several hosts has ended, or says nothing any more; none goes on."""


class BenchmarkError(PshareError):
    """A benchmark run that cannot be counted: a reply failed or was not what was asked for."""
