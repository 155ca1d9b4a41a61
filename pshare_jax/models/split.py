"""The split of a language model into one frozen prefill module and many decode modules.

After PrefillShare (arXiv 2602.12029): the prefill module writes the KV of a prompt, decode modules
that were trained on that KV read it and generate. The paper leaves open which module reads the
prompt's last token; here a decode module reads the end of the prompt that its split rule gives it
(`core/split_rule.py`; at least one token) and writes its own KV from there on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from pshare_jax.config import Sharing
from pshare_jax.core.split_rule import Invocation, LastTokens, SplitRule, parse_rule
from pshare_jax.errors import CertificateError, CheckpointError
from pshare_jax.models.attention import AttentionIO
from pshare_jax.models.config import ModelConfig
from pshare_jax.models.decoder import bind
from pshare_jax.models.lora import Adapters, LoraModule, check_lora, stack_adapters
from pshare_jax.models.weights import LORA_TARGETS, Weights, check_weights

DecodeKind = Literal["full", "lora"]


def tensor_hash(array: Any) -> str:
    """SHA-256 (hex) of an array's dtype, shape and bytes; a host array is not copied."""
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode())
    digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


@dataclass(frozen=True)
class Certificate:
    """What a decode module states about itself.

    Args:
        prefill_fingerprint: the base whose KV it was trained to read.
        tail: which tokens of a prompt it reads itself; an int is a number of tokens.
        kind: `full` weights of its own, or `lora` on the base's.
        cache_conditioned: whether it was trained on the base's KV; an ordinary fine-tune was not.
        weights_fingerprint: hash of its own weights.
        lora_rank: rank of its adapters; None for `full`, like the next two.
        lora_alpha: their scale: the update is `alpha / rank * a @ b`.
        lora_targets: which projections they adapt, out of `weights.LORA_TARGETS`.

    Raises:
        CertificateError: values that contradict each other.
    """

    prefill_fingerprint: str
    tail: SplitRule
    kind: DecodeKind
    cache_conditioned: bool
    weights_fingerprint: str
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tail, int):
            try:
                object.__setattr__(self, "tail", LastTokens(self.tail))
            except ValueError as error:
                raise CertificateError(f"certificate: {error}") from error
        lora = (self.lora_rank, self.lora_alpha, self.lora_targets)
        complete = (self.lora_rank or 0) > 0 and self.lora_alpha and self.lora_targets
        unknown = sorted(set(self.lora_targets or ()) - set(LORA_TARGETS))
        problem = None
        if self.kind == "full" and any(field is not None for field in lora):
            problem = "kind is 'full', but LoRA fields are set"
        elif self.kind == "lora" and not complete:
            problem = (
                "kind is 'lora', which needs a positive lora_rank, lora_alpha and lora_targets"
            )
        elif isinstance(self.tail, Invocation) and self.kind != "lora":
            problem = "tail is an invocation, which needs kind 'lora': without it the base answers"
        elif unknown:
            problem = f"lora_targets has {unknown[0]!r}; possible are {', '.join(LORA_TARGETS)}"
        if problem is not None:
            raise CertificateError(f"certificate: {problem}")

    def to_json(self) -> dict[str, Any]:
        """The certificate as a JSON object."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["tail"] = self.tail.to_json()
        if self.lora_targets is not None:
            values["lora_targets"] = list(self.lora_targets)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Certificate:
        """The inverse of `to_json`.

        Raises:
            CertificateError: names the field that is missing, unknown or of the wrong type.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise CertificateError(f"certificate: {unknown[0]} is not a known field")
        known_values = dict(values)
        try:
            if "tail" in values:
                known_values["tail"] = parse_rule(values["tail"])
            return msgspec.convert(known_values, cls)
        except ValueError as error:  # msgspec's too
            raise CertificateError(f"certificate: {error}") from error

    def lora_module(self, factors: Weights) -> LoraModule:
        """The LoRA module that this certificate and its factors make up.

        Raises:
            CheckpointError: this is the certificate of a full module.
        """
        if self.lora_rank is None or self.lora_alpha is None or self.lora_targets is None:
            raise CheckpointError("LoRA factors given, but the certificate says kind 'full'")
        return LoraModule(factors, self.lora_alpha, self.lora_rank, self.lora_targets)


def check_certificate(
    certificate: Certificate,
    fingerprint: str,
    sharing: Sharing,
    name: str = "decode module",
    former: Collection[str] = (),
) -> None:
    """Checks that a decode module may be loaded beside the base `fingerprint`.

    Args:
        certificate: the module's.
        fingerprint: the prefill fingerprint of the base that is being served.
        sharing: `shared` to read the base's KV, `isolated` to prefill with its own weights.
        name: what to call the module in messages.
        former: what earlier versions called this very base; a certificate may still say so.

    Raises:
        CertificateError: it belongs to another base; it is to share KV that it was never trained
            on; or it has an invocation, whose prompts only the base may read, but is isolated.
    """
    stated = certificate.prefill_fingerprint
    if stated != fingerprint and stated not in former:
        raise CertificateError(
            f"{name}: made for the base {stated[:12]}, but this base is {fingerprint[:12]}; "
            "convert it against this base, or serve it beside its own"
        )
    if sharing == "shared" and not certificate.cache_conditioned:
        raise CertificateError(
            f"{name}: was not trained on the base's KV cache and would answer wrongly from it; "
            "set `sharing: isolated` for it"
        )
    if sharing == "isolated" and isinstance(certificate.tail, Invocation):
        raise CertificateError(
            f"{name}: its weights act from its invocation on, and the base's before it; set "
            "`sharing: shared` for it"
        )


def isolated_namespace(base_fingerprint: str, certificate: Certificate) -> str:
    """Names the KV that an isolated decode module writes, by the weights that write it.

    A LoRA module's are the base's with its factors merged in, so that both are named. Modules of
    the same weights share their KV, whatever they are called; none shares the base's pages.

    Args:
        base_fingerprint: the current prefill fingerprint of the module's base.
        certificate: the module's, as `convert.manifest.read_manifest` gives it.
    """
    return f"isolated/{base_fingerprint}/{certificate.weights_fingerprint}"


class PrefillModule:
    """The frozen base: maps tokens to KV and never samples.

    Args:
        config: its architecture.
        weights: its full weights.
        fingerprint: its prefill fingerprint.

    Raises:
        CheckpointError: names the first weight that does not fit the config.
    """

    def __init__(self, config: ModelConfig, weights: Weights, fingerprint: str):
        check_weights(config, weights)
        self.config = config
        self.weights = weights
        self.fingerprint = fingerprint

    def write_kv(self, tokens: jax.Array, positions: jax.Array, attention: AttentionIO) -> None:
        """Gives the KV of `tokens [B, T]` int32 at `positions [B, T]` int32 to `attention`."""
        bind(self.config, self.weights).write_kv(tokens, positions, attention)


class DecodeModule:
    """Trained weights that read the prefill module's KV and generate.

    Args:
        config: the architecture, which is the base's.
        weights: full weights: its own, or for a LoRA module the base's.
        certificate: what it states about itself.
        lora: the factors of a LoRA module; None for a full one.

    Raises:
        CheckpointError: weights that do not fit the config or the certificate; names the first.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        certificate: Certificate,
        lora: Weights | None = None,
    ):
        check_weights(config, weights)
        if certificate.kind == "lora" and lora is None:
            raise CheckpointError("the certificate says kind 'lora', but no LoRA factors are given")
        self.config = config
        self.weights = weights
        self.certificate = certificate
        self._adapters: Weights | None = None
        if lora is not None:
            module = certificate.lora_module(lora)
            check_lora(config, module)
            self._adapters = stack_adapters([module])

    def logits(self, tokens: jax.Array, positions: jax.Array, attention: AttentionIO) -> jax.Array:
        """Logits after each of `tokens`, over the earlier KV that `attention` holds.

        Args:
            tokens: `[B, T]` int32, from the split of the prompt on.
            positions: `[B, T]` int32.
            attention: holds the prefill module's KV of earlier positions; gets this module's.

        Returns:
            `[B, T, vocab]` float32.
        """
        decoder = bind(self.config, self.weights)
        adapters = None
        if self._adapters is not None:
            adapters = Adapters(self._adapters, jnp.zeros(tokens.shape[0], jnp.int32))
        return decoder.logits(decoder.hidden(tokens, positions, attention, adapters))
