"""The training configuration. Nothing here imports JAX, so `--help` is quick."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pshare_jax.config import DType
from pshare_jax.core.split_rule import TailSetting

Mode = Literal["cache-conditioned", "full", "distill"]
BadLine = Literal["error", "skip"]
KernelBackend = Literal["auto", "xla", "cpu_ffi"]
MemoryCheck = Literal["refuse", "warn", "off"]
Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class DataConfig:
    """The examples.

    Args:
        train: JSONL files, one example a line: `{"messages": [...], "tools": [...]}` or
            `{"prompt": ..., "completion": ...}`.
        eval: JSONL files of held-out examples; none turns evaluation off.
        max_length: most tokens of one example; a longer one is a bad line, and so is one that is
            longer than the base has positions.
        on_bad_line: `error` stops at the first line that cannot be used, `skip` counts them.
        turns: which answers of a conversation are trained: `all`, or the `last` alone.
        tool_parser: `models[].tool_parser` of the server that is to serve the module: where the
            base's chat template knows no tools, they are written in its form.
        special_tokens_in_text: `special_tokens_in_text` of that server: whether special tokens that
            messages spell out are such, and not text.
        buckets: most shapes that batches are padded to; each one is compiled. Fewer are used where
            that wastes little.
    """

    train: list[str] = field(default_factory=list)
    eval: list[str] = field(default_factory=list)
    max_length: int = 1024
    on_bad_line: BadLine = "error"
    turns: Literal["all", "last"] = "all"
    tool_parser: str = "auto"
    special_tokens_in_text: bool = False
    buckets: int = 10


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
        teacher: an ordinary fine-tune of the base: a Hugging Face folder, PEFT's folder of a LoRA,
            or a decode module with KV of its own (full or LoRA); or the URL of a server with
            OpenAI's API, whose answers are learned as texts.
        init: what a student of all weights starts from: the `teacher`'s or the `base`'s. A LoRA
            student starts from the base.
        max_tokens: most tokens of the teacher's answer to a prompt that comes without one.
        model: the model's name at a URL. The key is taken from OPENAI_API_KEY.
        concurrency: requests to a URL that are on their way at once.
    """

    teacher: str = ""
    init: Literal["teacher", "base"] = "teacher"
    max_tokens: int = 256
    model: str = ""
    concurrency: int = 16

    @property
    def is_url(self) -> bool:
        """Whether the teacher is a server."""
        return self.teacher.startswith(("http://", "https://"))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        learning_rate: the largest; 0 is 1e-3 for LoRA and 3e-4 for all weights.
        schedule: how it falls after the warm-up: `cosine` or `linear` to zero, or `constant`.
        warmup: share of all steps in which the rate rises linearly from zero.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled decay of matrices; norm scales and biases have none.
        clip_norm: largest global norm of a gradient; 0 turns clipping off.
        batch_size: examples of one step; the last of an epoch has what is left.
        micro_batch_size: examples of one forward and backward pass; 0 means `batch_size`.
        epochs: passes over the training set.
        max_steps: ends earlier, after so many steps; 0 does not.
        factory: `module:function` of your own that makes the optimizer: it gets this configuration
            and the schedule, and gives an optax gradient transformation. Empty is AdamW.
    """

    learning_rate: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 0.0
    batch_size: int = 16
    micro_batch_size: int = 0
    epochs: int = 2
    max_steps: int = 0
    factory: str = ""


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
        wandb: project of Weights & Biases that gets the metrics too; empty is none. Needs the extra
            `wandb`.
        peak_tflops: arithmetic rate of one device that utilisation is relative to; 0 measures that
            of a large matrix product.
    """

    log_every: int = 1
    eval_every: int = 100
    tensorboard: bool = True
    wandb: str = ""
    peak_tflops: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `python -m pshare_jax.train` needs.

    Args:
        base: the prefill checkpoint folder.
        output: the run folder: metrics, checkpoints, and the decode module in `decode_module/`.
        mode: `cache-conditioned` trains on the base's KV, `full` is ordinary fine-tuning (of all
            weights, or LoRA), `distill` matches an ordinary fine-tune from the base's KV.
        tail: what of a prompt the decode module reads itself: a number of last tokens;
            `last-message`, from the last user or tool message on; or `{invocation: [token ids]}`,
            from the last occurrence of these tokens on (LoRA only).
        init: what the weights start from: a decode module of this base, PEFT's folder, or a
            Hugging Face folder; a LoRA run takes a LoRA of its own rank and targets. Empty is the
            base.
        loss: `module:function` of your own: it gets float32 logits `[B, Y, vocab]` and the batch
            (`labels [B, Y]`, `weights [B, Y]`; when distilling `teacher_logits` too), and gives the
            loss of each target, `[B, Y]` float32. Empty is cross-entropy, or the divergence from
            the teacher.
        seed: order of the examples, initial LoRA factors.
        dtype: dtype of activations and KV; master weights are float32. `auto` is bfloat16,
            but float32 on CPUs where C++ does not multiply.
        remat: keep each layer's input only and compute the rest again for the gradient.
        memory_check: what is done when the first step is predicted to need more memory than there
            is: `refuse` to start, `warn`, or `off`: nothing is predicted.
        show: print so many examples, with what of them is trained, and a report on the data; then
            end without training.
        kernel_backend: what multiplies matrices. `auto` is `cpu_ffi`, C++, for bfloat16 on one
            device that is a CPU, and `xla` elsewhere.
        compilation_cache_dir: folder of XLA's persistent compilation cache; empty turns it off. One
            that JAX_COMPILATION_CACHE_DIR names goes before it.
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
    tail: TailSetting = 32
    init: str = ""
    loss: str = ""
    seed: int = 0
    dtype: DType = "auto"
    remat: bool = False
    memory_check: MemoryCheck = "refuse"
    show: int = 0
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


def with_rate(config: TrainConfig) -> TrainConfig:
    """`config` with a learning rate: that which suits what is trained, where it names none."""
    if config.optimizer.learning_rate:
        return config
    rate = 1e-3 if config.lora.rank else 3e-4
    return replace(config, optimizer=replace(config.optimizer, learning_rate=rate))


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as a JSON object."""
    return dataclasses.asdict(config)
