"""What the types of a training configuration cannot check. Nothing here imports JAX."""

from __future__ import annotations

import math
import re
from typing import Any

from pshare_jax.core.split_rule import LAST_MESSAGE, Invocation, parse_rule
from pshare_jax.errors import ConfigError
from pshare_jax.train.config import TrainConfig

_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "show": 0,
    "data.max_length": 2,
    "data.buckets": 1,
    "distill.max_tokens": 1,
    "distill.concurrency": 1,
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


_HOOK = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


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
    if config.lora.rank and len(set(config.lora.targets)) != max(len(config.lora.targets), 1):
        raise ConfigError("lora.targets: name at least one projection, and none twice")
    if (config.mode == "distill") != bool(config.distill.teacher):
        raise ConfigError(
            "distill.teacher: mode distill needs one, the other modes have none; it is "
            f"{config.distill.teacher!r} in mode {config.mode}"
        )
    if config.distill.is_url and not config.distill.model:
        raise ConfigError("distill.model: name the model that answers at distill.teacher")
    for key in ("loss", "optimizer.factory"):
        if (path := _value(config, key)) and not _HOOK.fullmatch(path):
            raise ConfigError(f"{key} is {path!r}; write it as module:function")
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
