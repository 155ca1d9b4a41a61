"""What a launcher is told, as parts of `config.ClusterConfig`: where Ray is to place processes, and
how many workers there may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RayStrategy = Literal["spread", "pack"]


@dataclass(frozen=True)
class RayResources:
    """What a process asks Ray for.

    Args:
        cpus: of Ray's count; 0 asks for none.
        gpus: that the process is then given, as `CUDA_VISIBLE_DEVICES`.
        resources: others by name, such as `TPU: 4`, or one that only some hosts have.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class RayConfig:
    """Where the launcher `ray` has Ray place processes.

    Args:
        name: of this cluster, for launchers that share a Ray; a launcher goes on with the
            processes of one that had the same name.
        strategy: `spread` over hosts, or `pack` on few of them.
        keep: whether processes go on when the launcher is told to end, until another one of the
            same name comes; else it ends them.
        one_port: whether all frontends listen on `server.port`, where each has a host of its own.
        frontend: what a frontend asks for.
        prefill: what a prefill worker asks for.
        decode: what a decode worker asks for.
    """

    name: str = "pshare"
    strategy: RayStrategy = "spread"
    keep: bool = False
    one_port: bool = False
    frontend: RayResources = field(default_factory=RayResources)
    prefill: RayResources = field(default_factory=RayResources)
    decode: RayResources = field(default_factory=RayResources)


@dataclass(frozen=True)
class KubernetesConfig:
    """What the launcher `kubernetes` changes the size of; it starts nothing itself.

    Args:
        prefill: of prefill workers, as the API names it: `statefulsets/NAME`, or
            `leaderworkersets/NAME` for workers of several hosts.
        decode: of decode workers.
        frontends: who is asked for the load: `HOST:PORT`, or `dns:NAME:PORT` for all that have the
            name, with commas between them.
    """

    prefill: str = "statefulsets/pshare-prefill"
    decode: str = "statefulsets/pshare-decode"
    frontends: str = "dns:pshare-frontends:8000"


@dataclass(frozen=True)
class AutoscaleConfig:
    """How many workers the launcher may run; it begins with `prefill.engines` and `decode.engines`.

    Args:
        max_prefill: most prefill workers; 0 leaves their number as it is.
        max_decode: most decode workers; 0 leaves their number as it is.
        min_prefill: fewest prefill workers.
        min_decode: fewest decode workers.
        devices: workers of both sides together, which then change sides; 0 lets each side have as
            many as it needs.
        observe_seconds: between two looks at the load.
        prefill_tokens_per_s: prompt tokens that one prefill worker computes; 0 is what they are
            seen to.
        decode_sequences: that one decode worker runs at once at the speed that is wanted; 0 is
            `decode.max_num_seqs`.
        target: part of what workers can do that the demand should take.
        window: seconds over which the demand is averaged.
        long_window: seconds of the average that must agree.
        rise_seconds: for which more workers must have been right before there are more.
        fall_seconds: for which fewer must have been right.
        settle_seconds: after a change in which no other is made.
    """

    max_prefill: int = 0
    max_decode: int = 0
    min_prefill: int = 1
    min_decode: int = 1
    devices: int = 0
    observe_seconds: float = 5.0
    prefill_tokens_per_s: float = 0.0
    decode_sequences: float = 0.0
    target: float = 0.75
    window: float = 60.0
    long_window: float = 300.0
    rise_seconds: float = 15.0
    fall_seconds: float = 180.0
    settle_seconds: float = 60.0

    @property
    def is_on(self) -> bool:
        """Whether the number of workers may change."""
        return bool(self.max_prefill or self.max_decode or self.devices)
