"""The commands of `bench` that take options alone and print lines: what each of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pshare_jax.bench import (
    ahead,
    arrivals,
    autoscale,
    codec,
    failover,
    fp8_kv,
    loading,
    masks,
    moving,
    pool,
    restart,
    roofline,
    routes,
    shift,
    starve,
    threads,
    threads_report,
    tiers,
    turns,
    watching,
    weights,
    wire,
)
from pshare_jax.bench.distributions import TextsOptions
from pshare_jax.bench.fleet import command as fleet
from pshare_jax.bench.hardware import report as hardware_report
from pshare_jax.bench.hardware import run as hardware


def never_failed(result: dict[str, Any]) -> bool:
    """Of a benchmark that measures: whatever it finds is a result."""
    return False


@dataclass(frozen=True)
class PlainCommand:
    """A command that takes options alone, and prints lines; `failed` ends it with exit code 1."""

    description: str
    options: type
    run: Callable[[Any], dict[str, Any]]
    lines: Callable[[dict[str, Any]], Sequence[str]]
    failed: Callable[[dict[str, Any]], bool] = never_failed


PLAIN: dict[str, PlainCommand] = {
    "turns": PlainCommand(
        "Appended turns of many sessions, computed together or one prompt a call.",
        turns.TurnsOptions,
        turns.run,
        turns.lines,
    ),
    "codec": PlainCommand(
        "Lossless compression of KV: how far, how fast, and on which links it pays.",
        codec.CodecOptions,
        codec.run,
        codec.lines,
    ),
    "wire": PlainCommand(
        "KV from another process, as it is and compressed, over links of several rates.",
        wire.WireOptions,
        wire.run,
        wire.lines,
    ),
    "restart": PlainCommand(
        "First tokens over a known context after a restart, with a store and without.",
        restart.RestartOptions,
        restart.run,
        restart.lines,
    ),
    "pool": PlainCommand(
        "First tokens over what another process has computed: shared pool, socket, own cache.",
        pool.PoolOptions,
        pool.run,
        pool.lines,
    ),
    "tiers": PlainCommand(
        "KV fetched ahead from tiers below the pools, against fetching on demand; virtual time.",
        tiers.TiersOptions,
        tiers.run,
        tiers.lines,
    ),
    "routes": PlainCommand(
        "Routing by load alone over a KV store, against routing by prefix; virtual time.",
        routes.RoutesOptions,
        routes.run,
        routes.lines,
    ),
    "ahead": PlainCommand(
        "First tokens of agents whose contexts do not fit into the pool, in a real engine.",
        ahead.AheadOptions,
        ahead.run,
        ahead.lines,
    ),
    "shift": PlainCommand(
        "Meshes given from decode to prefill while rows run; virtual time.",
        shift.ShiftOptions,
        shift.run,
        shift.lines,
    ),
    "moving": PlainCommand(
        "What replies notice when the mesh that generates them is given to prefill.",
        moving.MovingOptions,
        moving.run,
        moving.lines,
    ),
    "masks": PlainCommand(
        "Decode steps whose tokens follow a grammar, beside free ones.",
        masks.MasksOptions,
        masks.run,
        masks.lines,
    ),
    "loading": PlainCommand(
        "What streams notice of decode modules being loaded and unloaded.",
        loading.LoadingOptions,
        loading.run,
        loading.lines,
    ),
    "failover": PlainCommand(
        "What streams notice when the decode worker that generates for them is killed.",
        failover.FailoverOptions,
        failover.run,
        failover.lines,
        failover.failed,
    ),
    "autoscale": PlainCommand(
        "Workers that change sides while the load changes, in virtual time.",
        autoscale.AutoscaleOptions,
        autoscale.run,
        autoscale.lines,
    ),
    "fleet": PlainCommand(
        "Routers of a thousand engines in virtual time, beside one that knows everything.",
        fleet.RoutersOptions,
        fleet.run,
        fleet.lines,
    ),
    "weights": PlainCommand(
        "Weights of 8 bits: bytes, memory, and how far the next-token distributions move.",
        weights.WeightsOptions,
        weights.run,
        weights.lines,
    ),
    "fp8-kv": PlainCommand(
        "KV of 8 bits: bytes, and how far the next-token distributions move.",
        TextsOptions,
        fp8_kv.run,
        fp8_kv.lines,
    ),
    "starve": PlainCommand(
        "How long a small request takes while others flood the server.",
        starve.StarveOptions,
        starve.run,
        starve.lines,
    ),
    "arrivals": PlainCommand(
        "First tokens of sessions that arrive together, and of a short request behind them.",
        arrivals.ArrivalsOptions,
        arrivals.run,
        arrivals.lines,
    ),
    "threads": PlainCommand(
        "What steps would take on more cores than this machine has, by a simulation.",
        threads.ThreadsOptions,
        threads.run,
        threads_report.lines,
    ),
    "ui": PlainCommand(
        "Processor time that a server's page costs while somebody watches it.",
        watching.WatchingOptions,
        watching.run,
        watching.lines,
    ),
    "machine": PlainCommand(
        "What this CPU can do at most: products, memory, and whether its matrix unit is used.",
        roofline.MachineOptions,
        roofline.run,
        roofline.lines,
    ),
    "hardware": PlainCommand(
        "What this machine's accelerator does: kernels, serving, transfers; minutes.",
        hardware.HardwareOptions,
        hardware.run,
        hardware_report.lines,
        hardware.failed,
    ),
}
