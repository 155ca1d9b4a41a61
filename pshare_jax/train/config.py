"""The training configuration. Nothing here imports JAX, so `--help` is quick."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pshare_jax.config import DType
from pshare_jax.core.split_rule import LAST_MESSAGE, Invocation, TailSetting, parse_rule
from pshare_jax.errors import ConfigError

Mode = Literal["cache-conditioned", "full", "distill"]
BadLine = Literal["error", "skip"]
KernelBackend = Literal["auto", "xla", "cpu_ffi"]
Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class DataConfig:
    """The examples.

    Args:
        train: JSONL files, one example a line: `{"messages": [...], "tools": [...]}` or
            `{"prompt": ..., "completion": ...}`.
        eval: JSONL files of held-out examples; none turns evaluation off.
        max_length: most tokens of one example; a longer one is a bad line.
        on_bad_line: `error` stops at the first line that cannot be used, `skip` counts them.
        buckets: number of shapes that batches are padded to; each one is compiled.
    """

    train: list[str] = field(default_factory=list)
    eval: list[str] = field(default_factory=list)
    max_length: int = 1024
    on_bad_line: BadLine = "error"
    buckets: int = 3


@dataclass(frozen=True)
class LoraConfig:
    """LoRA instead of a full decode module.

    Args:
        rank: rank of the factors; 0 trains a full module.
        alpha: the update is `alpha / rank * a @ b`; 0 means `2 * rank`.
        targets: the projections that are adapted.
    """

    rank: int = 0
    alpha: float = 0.0
    targets: list[Target] = field(
        default_factory=lambda: ["q", "k", "v", "o", "gate", "up", "down"]
    )


@dataclass(frozen=True)
class DistillConfig:
    """The teacher of `mode: distill`.

    Args:
        teacher: an ordinary fine-tune of the base: a Hugging Face folder, or a full decode module.
        init: what a full student starts from: the `teacher`'s weights or the `base`'s. A LoRA
            student always starts from the base.
        max_tokens: most tokens of the teacher's answer to a prompt that comes without one.
    """

    teacher: str = ""
    init: Literal["teacher", "base"] = "teacher"
    max_tokens: int = 256


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        learning_rate: the largest.
        schedule: how it falls after the warm-up: `cosine` or `linear` to zero, or `constant`.
        warmup: share of all steps in which the rate rises linearly from zero.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled decay of matrices; norm scales and biases have none.
        clip_norm: largest global norm of a gradient; 0 turns clipping off.
        batch_size: examples of one step.
        micro_batch_size: examples of one forward and backward pass; 0 means `batch_size`.
        epochs: passes over the training set.
        max_steps: ends earlier, after so many steps; 0 does not.
    """

    learning_rate: float = 2e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 0.0
    batch_size: int = 128
    micro_batch_size: int = 0
    epochs: int = 1
    max_steps: int = 0


@dataclass(frozen=True)
class KVCacheConfig:
    """Where the frozen module's KV of all examples is kept, so that it is computed once.

    Args:
        memory_gb: largest size (10^9 bytes) that is kept in host memory.
        disk_gb: largest size that is kept in a file, when memory does not suffice. The file has
            room for all examples, also where a run needs some of them only.
        folder: where that file lies while training runs; empty means the run folder.
        keep: whether it is always a file, which stays: later runs on the same base and examples
            (of another learning rate, tail or seed, say) that name the same folder read it.
    """

    memory_gb: float = 4.0
    disk_gb: float = 0.0
    folder: str = ""
    keep: bool = False


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis.

    Args:
        data: replicas that each see a share of the batch.
        fsdp: devices over which batch, weights and optimizer state are split.
        tensor: devices over which heads and hidden units are split.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.tensor


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes, each with the same configuration but its own `process_id`.

    Args:
        coordinator: `host:port` of process 0. Empty: the environment variable
            JAX_COORDINATOR_ADDRESS; without either there is one process.
        num_processes: how many; 0: JAX_NUM_PROCESSES, else what the cluster manager says.
        process_id: which one this is; -1: JAX_PROCESS_ID, else what the cluster manager says.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints to resume from.

    Args:
        every: steps between two; 0 saves none until the run is stopped or ends.
        keep: how many of the newest are kept; the one with the best evaluation is kept besides.
        export: which weights become the decode module: the `last` or the `best` by evaluation.
    """

    every: int = 200
    keep: int = 2
    export: Literal["last", "best"] = "last"


@dataclass(frozen=True)
class ReportConfig:
    """What is measured and shown.

    Args:
        log_every: steps between two lines of metrics.
        eval_every: steps between two evaluations; 0 evaluates at the end only.
        tensorboard: whether metrics are written for TensorBoard too.
        peak_tflops: arithmetic rate of one device that utilisation is relative to; 0 measures that
            of a large matrix product.
    """

    log_every: int = 1
    eval_every: int = 100
    tensorboard: bool = True
    peak_tflops: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `python -m pshare_jax.train` needs.

    Args:
        base: the prefill checkpoint folder.
        output: the run folder: metrics, checkpoints, and the decode module in `decode_module/`.
        mode: `cache-conditioned` trains on the base's KV, `full` is ordinary fine-tuning, `distill`
            matches an ordinary fine-tune from the base's KV.
        tail: what of a prompt the decode module reads itself: a number of last tokens;
            `last-message`, from the last user or tool message on; or `{invocation: [token ids]}`,
            from the last occurrence of these tokens on (LoRA only).
        seed: order of the examples, initial LoRA factors.
        dtype: dtype of activations and KV; master weights are float32. `auto` is bfloat16,
            but float32 on CPUs where C++ does not multiply.
        remat: keep each layer's input only and compute the rest again for the gradient.
        kernel_backend: what multiplies matrices. `auto` is `cpu_ffi`, C++, for bfloat16 on one
            device that is a CPU, and `xla` elsewhere.
        compilation_cache_dir: folder of XLA's persistent compilation cache; empty turns it off.
        data: the examples.
        lora: LoRA instead of a full decode module.
        distill: the teacher.
        optimizer: AdamW and its schedule.
        kv_cache: where the frozen module's KV is kept.
        mesh: devices along each mesh axis.
        distributed: several processes.
        checkpoint: checkpoints to resume from.
        report: what is measured and shown.
    """

    base: str
    output: str
    mode: Mode = "cache-conditioned"
    tail: TailSetting = 1
    seed: int = 0
    dtype: DType = "auto"
    remat: bool = False
    kernel_backend: KernelBackend = "auto"
    compilation_cache_dir: str = "~/.cache/pshare_jax/xla"
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    kv_cache: KVCacheConfig = field(default_factory=KVCacheConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output).expanduser()

    @property
    def micro_batch_size(self) -> int:
        """Examples of one forward and backward pass."""
        return self.optimizer.micro_batch_size or self.optimizer.batch_size

    @property
    def lora_alpha(self) -> float:
        """The scale of a LoRA module."""
        return self.lora.alpha or 2.0 * self.lora.rank


_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "data.max_length": 2,
    "data.buckets": 1,
    "distill.max_tokens": 1,
    "lora.rank": 0,
    "lora.alpha": 0,
    "optimizer.learning_rate": 0,
    "optimizer.weight_decay": 0,
    "optimizer.epsilon": 0,
    "optimizer.clip_norm": 0,
    "optimizer.batch_size": 1,
    "optimizer.micro_batch_size": 0,
    "optimizer.epochs": 1,
    "optimizer.max_steps": 0,
    "kv_cache.memory_gb": 0,
    "kv_cache.disk_gb": 0,
    "mesh.data": 1,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "report.log_every": 1,
    "report.eval_every": 0,
    "report.peak_tflops": 0,
}


def _value(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check_config(config: TrainConfig) -> None:
    """Checks what types alone cannot.

    Raises:
        ConfigError: names the key, its value, and what it should be.
    """
    for key, least in _AT_LEAST.items():
        value = _value(config, key)
        if not (math.isfinite(value) and value >= least):
            raise ConfigError(f"{key} is {value}; it must be at least {least:g}")
    _check_tail(config)
    for key in ("optimizer.beta1", "optimizer.beta2", "optimizer.warmup"):
        if not 0 <= (value := _value(config, key)) < 1:
            raise ConfigError(f"{key} is {value}; it must be at least 0 and less than 1")
    optimizer, mesh = config.optimizer, config.mesh
    if not config.data.train:
        raise ConfigError("data.train: name at least one JSONL file")
    if optimizer.batch_size % config.micro_batch_size:
        raise ConfigError(
            f"optimizer.batch_size is {optimizer.batch_size}; it must be a multiple of "
            f"optimizer.micro_batch_size, {config.micro_batch_size}"
        )
    if config.micro_batch_size % (mesh.data * mesh.fsdp):
        raise ConfigError(
            f"a micro-batch of {config.micro_batch_size} examples cannot be split evenly over "
            f"mesh.data x mesh.fsdp = {mesh.data * mesh.fsdp} devices"
        )
    if config.mode == "full" and config.lora.rank:
        raise ConfigError("mode full trains all weights; set lora.rank to 0 or choose another mode")
    if config.lora.rank and len(set(config.lora.targets)) != max(len(config.lora.targets), 1):
        raise ConfigError("lora.targets: name at least one projection, and none twice")
    if (config.mode == "distill") != bool(config.distill.teacher):
        raise ConfigError(
            "distill.teacher: mode distill needs one, the other modes have none; it is "
            f"{config.distill.teacher!r} in mode {config.mode}"
        )
    if config.kv_cache.keep and not (config.kv_cache.folder and config.kv_cache.disk_gb):
        raise ConfigError("kv_cache.keep needs kv_cache.folder, and kv_cache.disk_gb above 0")
    if config.checkpoint.export == "best" and not config.data.eval:
        raise ConfigError("checkpoint.export: best needs data.eval to tell which weights are best")


def _check_tail(config: TrainConfig) -> None:
    if config.tail == LAST_MESSAGE:
        return
    try:
        rule = parse_rule(config.tail)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if isinstance(rule, Invocation) and not config.lora.rank:
        raise ConfigError(
            "tail: an invocation is for LoRA modules, since the base answers without it; set "
            "lora.rank"
        )


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as a JSON object."""
    return dataclasses.asdict(config)
