"""What serving may be told: see `config_files` for how it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pshare_jax.launch_config import AutoscaleConfig, KubernetesConfig, RayConfig

Sharing = Literal["shared", "isolated"]
DType = Literal["auto", "float32", "bfloat16"]
WeightFormat = Literal["plain", "int8", "int8-dynamic", "fp8"]
KvDtype = Literal["auto", "fp8"]
SharedPrefix = Literal["auto", "on", "off"]
ConnectorName = Literal["auto", "device_put", "same-mesh"]
KvCodec = Literal["auto", "planes", "top16", "raw"]
Admission = Literal["second-use", "always"]
RoutingPolicy = Literal["prefix", "load"]
Roles = Literal["fixed", "flexible"]
PrefetchPolicy = Literal["off", "next-agent"]
Reasoning = Literal["auto", "on", "off"]
GenerationConfig = Literal["auto", "none"]
ReplyKV = Literal["off", "ahead", "while-decoding"]
Launcher = Literal["none", "local", "ray", "kubernetes"]
Role = Literal["prefill", "decode", "both"]
Transport = Literal["auto", "shm", "http", "jax-transfer"]
MetricsAccess = Literal["auto", "public", "key", "admin", "off"]
AccessLogFormat = Literal["text", "json", "off"]


@dataclass(frozen=True)
class ModelEntry:
    """One served model.

    Args:
        name: the name that clients ask for.
        checkpoint: a decode-module checkpoint folder, or `identity` for the base's own weights.
        sharing: `shared` reads the base's KV; `isolated` prefills with its own weights.
        decode_engines: indices of the decode engines that host it; empty means all.
        tool_parser: the form in which it writes calls of tools: `hermes`, `llama3_json`, `mistral`,
            `pythonic`, `qwen3_coder`, or another that is registered; `auto` goes by the chat
            template, `none` leaves calls in the text.
        reasoning: whether `<think>...</think>` is split from its answers; `auto` is where the chat
            template has that tag.
        aliases: other names that clients may ask for; answers and metrics name it by `name`.
    """

    name: str
    checkpoint: str = "identity"
    sharing: Sharing = "shared"
    decode_engines: list[int] = field(default_factory=list[int])
    tool_parser: str = "auto"
    reasoning: Reasoning = "auto"
    aliases: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class PrefillConfig:
    """The prefill side.

    Args:
        engines: number of prefill engines, each with a mesh of its own.
        tensor_parallel: devices of one engine's mesh.
        hosts: processes, each with as many of these devices, that have one engine's mesh together;
            in a cluster only.
        num_pages: pages of one engine's pool; 0 sizes it from `max_model_len`.
        chunk_buckets: chunk lengths (tokens) that are compiled; the largest is the chunk size, and
            as many tokens of shorter prompts are computed in one call.
    """

    engines: int = 1
    tensor_parallel: int = 1
    hosts: int = 1
    num_pages: int = 0
    chunk_buckets: list[int] = field(default_factory=lambda: [32, 128, 512])


@dataclass(frozen=True)
class DecodeConfig:
    """The decode side.

    Args:
        engines: number of decode engines, each with a mesh of its own.
        tensor_parallel: devices of one engine's mesh.
        hosts: processes, each with as many of these devices, that have one engine's mesh together;
            in a cluster only.
        num_pages: pages of one engine's pool; 0 sizes it from `max_model_len`.
        max_num_seqs: sequences that may run at once on one engine.
        batch_buckets: batch sizes that are compiled; the largest bounds one dispatch.
        replay_buckets: chunk lengths (tokens) with which a decode module extends a sequence by
            known tokens: the tail of a prompt, or a replay.
        steps_per_dispatch: most tokens a sequence gets from one device call.
        group_quantum: steps that a group of models gets before the next has its turn; full modules
            are a group each, LoRA modules of one base are all in one. More makes batches larger,
            and streams of different models less even.
        shared_prefix: whether attention reads the pages that several sequences of a batch share
            once for all of them. `auto` does on TPUs and GPUs, for batches where that saves a
            quarter of the pages or more; `on` wherever a page is saved and the kernels can. Each
            batch bucket from 2 up is then compiled twice.
        max_loras: LoRA modules that there is room for, those of the configuration and those that
            are loaded while the server runs, until their last request has ended. 0 is as many as
            are configured. Each takes part in every step, used or not.
        max_lora_rank: greatest rank of a LoRA module, where `max_loras` makes room.
        max_full: full modules that there may be, likewise; each that is loaded takes the memory of
            its weights. 0 is as many as are configured.
    """

    engines: int = 1
    tensor_parallel: int = 1
    hosts: int = 1
    num_pages: int = 0
    max_num_seqs: int = 32
    batch_buckets: list[int] = field(default_factory=lambda: [1, 8, 32])
    replay_buckets: list[int] = field(default_factory=lambda: [32])
    steps_per_dispatch: int = 1
    group_quantum: int = 32
    shared_prefix: SharedPrefix = "auto"
    max_loras: int = 0
    max_lora_rank: int = 16
    max_full: int = 0


@dataclass(frozen=True)
class SessionsConfig:
    """What is done for calls to come.

    Args:
        max_ttl_seconds: for which a request may ask its pages to be kept; longer ones are cut.
        pinned_share: of each pool's pages, that may be kept so.
    """

    max_ttl_seconds: float = 3600.0
    pinned_share: float = 0.5


@dataclass(frozen=True)
class KvStoreConfig:
    """Where pages of prompts are kept beyond the pools, for all processes of a host.

    Args:
        path: file of the pool in shared memory, such as `/dev/shm/pshare-kv`; empty turns the
            store off. Servers with the same path share it, and a restarted one finds it.
        bytes: of that file.
        disk_path: file of the disk tier; empty is none.
        disk_bytes: of that file.
        codec: how pages are compressed, without loss. `planes` and `top16` are for bfloat16; `auto`
            is `planes` where it pays, and `raw` elsewhere.
        admission: what the disk takes: pages that are used a second time, or every page.
        prefetch: whether pages are fetched before a prompt asks for them. `next-agent` fetches
            those of the agent that a session calls next, see docs/kv-tiers.md.
        prefetch_bytes: most bytes of a prefill worker's pool that hold pages which were fetched so
            and which nobody has used yet.
    """

    path: str = ""
    bytes: int = 0
    disk_path: str = ""
    disk_bytes: int = 0
    codec: KvCodec = "auto"
    admission: Admission = "second-use"
    prefetch: PrefetchPolicy = "off"
    prefetch_bytes: int = 2**28


@dataclass(frozen=True)
class RouterConfig:
    """Who does what, where there are several engines.

    Args:
        policy: which prefill engine covers a prompt. `prefix` is the one that has most of it,
            unless it is behind by more than that is worth; with `load` it is the one with least to
            do, once the KV store has the prompt, so that all have it (it needs `kv_store.path`).
        roles: with `flexible` every mesh can do both prefill and decode, over one pool, and is
            given to the other while serving, see docs/kv-tiers.md; `prefill.engines` and
            `decode.engines` say how it begins. Each mesh then has the weights of both sides.
        backlog_tokens: with `flexible` roles, prompt tokens that wait at each prefill engine when
            another mesh is given to prefill; 0 leaves meshes as they are until they are told.
    """

    policy: RoutingPolicy = "prefix"
    roles: Roles = "fixed"
    backlog_tokens: int = 8192


@dataclass(frozen=True)
class ClusterConfig:
    """Workers in processes of their own. Without a launcher and without workers there is one
    process for everything.

    Args:
        launcher: `local` starts `prefill.engines` and `decode.engines` worker processes and
            `frontends` servers on this machine, and starts again what ends; `ray` has Ray place
            them on its hosts; `kubernetes` has as many workers as `autoscale` finds right, of those
            that Kubernetes runs.
        ray_address: `HOST:PORT` of the Ray that the launcher uses, or `auto` for the one that runs
            on this machine; empty starts one here that only this machine can reach.
        ray: what the launcher asks of it.
        kubernetes: what the launcher changes there.
        autoscale: how many workers the launcher may run.
        frontends: servers that the launcher starts; the first listens on `server.port`, the others
            on the ports after it.
        workers: addresses, `HOST:PORT`, of worker processes that somebody else starts with
            `pshare worker`; this process then is a frontend. `dns:NAME:PORT` is every address that
            the name has, looked up again and again.
        token_file: file of the secret by which the processes of a cluster know each other; without
            it, and without a certificate, workers are for 127.0.0.1 only.
        tls_cert: PEM file of this process's certificate and those above it; with `tls_key` and
            `tls_ca` all processes of the cluster speak TLS with each other and show one.
        tls_key: PEM file of its private key, without a password.
        tls_ca: PEM file of the CA that is the cluster's own: whose certificate it has signed is one
            of its processes.
        shm_path: folder in memory through which pages go between processes of one host.
        transport: how pages go from worker to worker: `auto` is through shared memory on one host
            and by HTTP between hosts; `shm` and `http` are that alone; `jax-transfer` is from
            device to device where both workers say so and can, else as `auto`.
        codec: how pages are compressed, without loss, on their way to another host, as
            `kv_store.codec`; `auto` is `planes` where that is measured to be faster.
        beat_seconds: between two signs of life of a worker's engine.
        lost_seconds: after this without one its sequences go on elsewhere.
        patience_seconds: how long a request waits while no worker that could do it is there.
        max_attempts: attempts of a request that may be lost with the workers that had them.
        take_turns: whether the engines of a CPU compute one at a time, as those of one process do;
            `false` where each has cores of its own.
        cpus: of each worker that the local launcher starts: lists such as `0-15`, which the prefill
            workers get in turn and then the decode workers; `numa` alone is one for each node of
            the machine. Engines of one list take turns with each other only.
    """

    launcher: Launcher = "none"
    ray_address: str = ""
    ray: RayConfig = field(default_factory=RayConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    autoscale: AutoscaleConfig = field(default_factory=AutoscaleConfig)
    frontends: int = 1
    workers: list[str] = field(default_factory=list[str])
    token_file: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    shm_path: str = "/dev/shm"
    transport: Transport = "auto"
    codec: KvCodec = "auto"
    beat_seconds: float = 0.25
    lost_seconds: float = 5.0
    patience_seconds: float = 60.0
    max_attempts: int = 6
    take_turns: bool = True
    cpus: list[str | int] = field(default_factory=list[str | int])


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP side.

    Args:
        host: address to listen on.
        port: port to listen on; 0 picks a free one.
        max_body_bytes: larger request bodies get 413.
        drain_seconds: how long SIGTERM waits for running requests.
        read_timeout_seconds: how long a client may take to send its request.
        write_timeout_seconds: how long a streaming client may leave its data unread.
        api_key: when set, requests must carry it as a bearer token. Not on the command line, which
            all users of the machine can read: in the file, or in the environment as
            `PSHARE_API_KEY`.
        api_keys_file: YAML or JSON file of several keys with their limits, see docs/operating.md;
            the environment's `PSHARE_API_KEYS` holds the same text. SIGHUP reads both again.
        metrics: who may read `/metrics`: all (`public`), who has a `key`, or an `admin` key, or
            nobody (`off`); `auto` is `admin` where there are several keys, which should not learn
            of each other.
        strict: refuses fields that are not known; otherwise they are ignored, with a log line and a
            `Warnings` header.
        generation_config: `auto` takes temperature, top-p and the like, where a request says
            nothing, from the base's `generation_config.json`; `none` takes OpenAI's defaults.
        special_tokens_in_text: whether special tokens that the messages of a chat spell out are
            such; else they are text, and only the chat template writes control tokens.
        max_n: most samples (`n`) of one prompt.
        max_prompts: most prompts of one completion request.
        max_fanout: most models of one fan-out request.
        max_scored_tokens: most prompt tokens of one request whose own log-probabilities are asked
            for (`echo` with `logprobs`, `prompt_logprobs`); each costs a decode step's row.
        max_body_items: most texts, lists and objects of one request body; a number counts for a
            sixteenth of one.
        worker_threads: threads that read large bodies, render chat templates and tokenise; as many
            again do so for small requests, which wait for no large ones.
        ping_seconds: a stream that has nothing to say for so long gets an SSE comment; 0 is never.
        cors_origins: origins whose pages may call the API from a browser; `*` is every one.
        adapter_root: folder below which decode modules may be loaded while the server runs; empty
            turns that off.
        allow_runtime_loading: whether whoever may ask may do that; else it takes an admin key.
        tls_cert: PEM file of the server's certificate and those above it; with `tls_key` the server
            speaks HTTPS.
        tls_key: PEM file of its private key, without a password.
        access_log: one line a request on standard error: `text`, or `json` with request id, model,
            tokens and time to first token; never prompts or answers.
        server_header: what the `Server` header of answers says; empty sends none.
        otlp_traces_endpoint: URL that traces are sent to, `http://collector:4318/v1/traces`; needs
            the extra `otel`.
        ui: whether there is a page at `/ui`, with a playground. It shows what is shared: which
            models work on how many tokens; of several keys to admin keys alone.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 4 * 1024 * 1024
    drain_seconds: float = 30.0
    read_timeout_seconds: float = 30.0
    write_timeout_seconds: float = 60.0
    api_key: str = ""
    api_keys_file: str = ""
    metrics: MetricsAccess = "auto"
    strict: bool = False
    generation_config: GenerationConfig = "auto"
    special_tokens_in_text: bool = False
    max_n: int = 128
    max_prompts: int = 256
    max_fanout: int = 16
    max_scored_tokens: int = 16_384
    max_body_items: int = 50_000
    worker_threads: int = 2
    ping_seconds: float = 15.0
    cors_origins: list[str] = field(default_factory=list[str])
    adapter_root: str = ""
    allow_runtime_loading: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    access_log: AccessLogFormat = "text"
    server_header: str = ""
    otlp_traces_endpoint: str = ""
    ui: bool = True


@dataclass(frozen=True)
class ServeConfig:
    """Everything that `python -m pshare_jax.serve` needs.

    Args:
        base: the prefill checkpoint folder.
        models: the served models, one entry a decode module.
        dtype: dtype of weights, activations and KV; `auto` is bfloat16, but float32 on CPUs
            without the kernels of `cpu_ffi`.
        weights: `int8` loads projections as whole numbers of 8 bits, with a scale for each output:
            half of the memory of bfloat16; `fp8` as FP8 numbers (e4m3), likewise. `int8-dynamic`,
            for CPUs, has embeddings in 8 bits too, and rounds what products read: half of the time
            of decoding besides. Each has KV of its own. A base that was imported in 8 bits is
            served as such where this is `plain`.
        kv_dtype: `fp8` keeps KV in 8 bits: half of bfloat16's memory, handoffs and reads. It is
            another KV than that of `auto`, which is kept in `dtype`.
        max_model_len: most tokens of prompt plus completion.
        page_size: token slots of one KV page.
        max_queue: waiting requests beyond which new ones get 429.
        compilation_cache_dir: folder of XLA's persistent compilation cache; empty turns it off.
        kernel_backend: `auto` is `pallas_tpu` on TPUs, `pallas_gpu` on GPUs, `cpu_ffi` on CPUs
            where a C++ compiler is there, and `xla` elsewhere.
        connector: how prompt pages get from prefill to decode. `device_put` copies them between
            meshes of their own; with `same-mesh` both work on one mesh over one pool, of the larger
            of the two configured sizes, and nothing is copied. `auto` is `device_put` where there
            are devices enough for it.
        reply_kv: `ahead` has the prefill module cover a reply once it has ended, while nothing else
            is to be done, so that the next call computes only what was appended. `off` leaves it to
            that call. `while-decoding` is not implemented.
        prefill: the prefill side.
        decode: the decode side.
        kv_store: pages of prompts beyond the pools, in shared memory and on disk.
        router: which engine does what.
        sessions: what is done for calls to come.
        cluster: workers in processes of their own.
        server: the HTTP side.
    """

    base: str
    models: list[ModelEntry] = field(default_factory=list[ModelEntry])
    dtype: DType = "auto"
    weights: WeightFormat = "plain"
    kv_dtype: KvDtype = "auto"
    max_model_len: int = 2048
    page_size: int = 32
    max_queue: int = 256
    compilation_cache_dir: str = "~/.cache/pshare_jax/xla"
    kernel_backend: str = "auto"
    connector: ConnectorName = "auto"
    reply_kv: ReplyKV = "ahead"
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    kv_store: KvStoreConfig = field(default_factory=KvStoreConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
