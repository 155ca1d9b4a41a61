"""What the engines' work costs: the interface, tables of measured steps, and rooflines."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from pshare_jax.bench.accelerators import Accelerator
from pshare_jax.errors import ConfigError
from pshare_jax.models.config import ModelConfig


class CostModel(Protocol):
    """Seconds that one engine's processor takes, alone."""

    @property
    def padded(self) -> bool:
        """Whether padding is computed, so that a step's size is that of its bucket."""
        ...

    def chunk(self, bucket: int, tokens: int, start: float) -> float:
        """A prefill chunk of `tokens` tokens from position `start` on, padded to `bucket`."""
        ...

    def replay(self, bucket: int, tokens: int, start: float) -> float:
        """The same on the decode side."""
        ...

    def decode_step(self, bucket: int, rows: int, context: float) -> float:
        """One token for `rows` sequences of one group, which read `context` tokens of KV in all;
        padded to `bucket` rows."""
        ...

    def send(self, pages: int) -> float:
        """The prefill side of a handoff of `pages` pages."""
        ...

    def receive(self, pages: int) -> float:
        """The decode side of a handoff."""
        ...


@dataclass(frozen=True)
class Line:
    """Seconds that grow in a straight line: `base + slope * x`."""

    base: float
    slope: float

    def __call__(self, x: float) -> float:
        """Seconds at `x`."""
        return self.base + self.slope * x


@dataclass(frozen=True)
class TableCosts:
    """Costs of steps that were measured, by size; straight lines between sizes.

    Args:
        chunks: size to seconds of a chunk by the tokens that each of its tokens sees in the mean.
        steps: size to seconds of a decode step by the tokens of KV that its rows read.
        send_line: seconds of a handoff by its pages, on the prefill side.
        receive_line: the same on the decode side.
        token_seconds: work of the host for each token that is sent to a client.
        padded: whether padding is computed, so that a step's size is that of its bucket and not
            what is in it.
    """

    chunks: Mapping[int, Line]
    steps: Mapping[int, Line]
    send_line: Line = Line(0.0, 0.0)
    receive_line: Line = Line(0.0, 0.0)
    token_seconds: float = 0.0
    padded: bool = True

    def chunk(self, bucket: int, tokens: int, start: float) -> float:
        """See CostModel."""
        return at_size(self.chunks, bucket if self.padded else tokens)(start + (tokens + 1) / 2)

    def replay(self, bucket: int, tokens: int, start: float) -> float:
        """See CostModel."""
        return self.chunk(bucket, tokens, start)

    def decode_step(self, bucket: int, rows: int, context: float) -> float:
        """See CostModel."""
        host = rows * self.token_seconds
        return at_size(self.steps, bucket if self.padded else rows)(context) + host

    def send(self, pages: int) -> float:
        """See CostModel."""
        return self.send_line(pages) if pages else 0.0

    def receive(self, pages: int) -> float:
        """See CostModel."""
        return self.receive_line(pages) if pages else 0.0


def at_size(lines: Mapping[int, Line], size: int) -> Line:
    """The line of a size: measured, between its neighbours, or continued beyond the last two."""
    if size in lines:
        return lines[size]
    sizes = sorted(lines)
    if len(sizes) == 1:
        return lines[sizes[0]]
    right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
    low, high = sizes[right - 1], sizes[right]
    share = (size - low) / (high - low)
    a, b = lines[low], lines[high]
    return Line(
        max(a.base + share * (b.base - a.base), 0.0),
        max(a.slope + share * (b.slope - a.slope), 0.0),
    )


@dataclass(frozen=True)
class Efficiency:
    """Assumptions: what is reached of the data sheets, and what they leave out.

    Args:
        compute: of the peak, in large matrix products.
        bandwidth: of the memory's bandwidth.
        link: of the links' bandwidth.
        launch_seconds: of the host, for each step or handoff; not hidden behind the device's work.
        collective_seconds: latency of one collective; two a layer where a mesh has several devices.
        extra_bytes: bytes that a decode step accesses, over the least that it must.
    """

    compute: float = 0.5
    bandwidth: float = 0.7
    link: float = 0.6
    launch_seconds: float = 1e-3
    collective_seconds: float = 8e-6
    extra_bytes: float = 1.0

    def __post_init__(self) -> None:
        for name in ("compute", "bandwidth", "link"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"efficiency.{name}: must be above 0 and at most 1, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Roofline:
    """Costs of a model on a mesh of `devices` chips, tensor parallel, in bfloat16.

    The larger of operations over peak and bytes over bandwidth, each by its efficiency, and the
    collectives after it.

    Args:
        chip: one device.
        efficiency: what is reached of it.
        model: the architecture.
        devices: of the mesh.
        page_size: tokens of a page.
        adapter_bytes: LoRA weights that a decode step reads besides, of all modules.
    """

    chip: Accelerator
    efficiency: Efficiency
    model: ModelConfig
    devices: int = 1
    page_size: int = 64
    adapter_bytes: float = 0.0

    @property
    def padded(self) -> bool:
        """See CostModel."""
        return True

    def chunk(self, bucket: int, tokens: int, start: float) -> float:
        """See CostModel."""
        seen = bucket * (start + (tokens + 1) / 2)
        operations = 2 * body_parameters(self.model) * bucket + self._attention(seen)
        read = 2 * body_parameters(self.model) + kv_bytes(self.model) * (start + tokens)
        return self._seconds(operations, read, bucket)

    def replay(self, bucket: int, tokens: int, start: float) -> float:
        """See CostModel."""
        return self.chunk(bucket, tokens, start)

    def decode_step(self, bucket: int, rows: int, context: float) -> float:
        """See CostModel."""
        del rows
        weights = body_parameters(self.model) + head_parameters(self.model)
        operations = 2 * weights * bucket + self._attention(context)
        read = 2 * weights + self.adapter_bytes + kv_bytes(self.model) * context
        return self._seconds(operations, read * self.efficiency.extra_bytes, bucket)

    def send(self, pages: int) -> float:
        """See CostModel. The wire is paid here: the prefill thread waits for it."""
        if not pages:
            return 0.0
        moved = pages * self.page_size * kv_bytes(self.model)
        rate = self.chip.link * self.efficiency.link * self.devices
        return self.efficiency.launch_seconds + moved / rate

    def receive(self, pages: int) -> float:
        """See CostModel."""
        if not pages:
            return 0.0
        moved = 2 * pages * self.page_size * kv_bytes(self.model)
        return moved / (self.chip.bandwidth * self.efficiency.bandwidth * self.devices)

    def _attention(self, pairs: float) -> float:
        model = self.model
        return 4 * model.num_layers * model.num_heads * model.head_dim * pairs

    def _seconds(self, operations: float, read: float, tokens: int) -> float:
        chip, reached, devices = self.chip, self.efficiency, self.devices
        work = max(
            operations / (chip.peak * reached.compute * devices),
            read / (chip.bandwidth * reached.bandwidth * devices),
        )
        return reached.launch_seconds + work + self._collectives(tokens)

    def _collectives(self, tokens: int) -> float:
        """Two all-reduces a layer; a ring moves 2 (n - 1) / n of the activations."""
        if self.devices == 1:
            return 0.0
        count = 2 * self.model.num_layers
        moved = 2 * tokens * self.model.hidden_size * 2 * (self.devices - 1) / self.devices
        wire = moved / (self.chip.link * self.efficiency.link)
        return count * (self.efficiency.collective_seconds + wire)


def body_parameters(model: ModelConfig) -> int:
    """Parameters of all layers' projections."""
    heads = model.hidden_size * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    return model.num_layers * (heads + 3 * model.hidden_size * model.intermediate_size)


def head_parameters(model: ModelConfig) -> int:
    """Parameters of the output head; the embedding has as many where it is not tied to it."""
    return model.vocab_size * model.hidden_size


def weight_bytes(model: ModelConfig) -> int:
    """Bytes of one full module in bfloat16; norms are left out."""
    tables = 1 if model.tie_word_embeddings else 2
    return 2 * (body_parameters(model) + tables * head_parameters(model))


def lora_bytes(model: ModelConfig, rank: int) -> int:
    """Bytes of one LoRA module of all projections in bfloat16."""
    hidden, mlp, d = model.hidden_size, model.intermediate_size, model.head_dim
    attention = 2 * (2 * hidden + d * (model.num_heads + model.num_kv_heads))
    return 2 * rank * model.num_layers * (attention + 3 * (hidden + mlp))


def kv_bytes(model: ModelConfig) -> int:
    """Bytes of K and V of one token over all layers in bfloat16."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * 2
