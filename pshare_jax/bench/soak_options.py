"""What `bench soak` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from pshare_jax.errors import ConfigError


@dataclass(frozen=True)
class SoakOptions:
    """What is done.

    Args:
        config: the server's configuration file.
        overrides: flags of the server, such as `--decode.num_pages=65`.
        minutes: of traffic.
        clients: requests at once.
        probes: different requests whose answers are recorded and compared.
        longest_prompt: words of the longest prompt.
        longest_answer: most tokens of an answer.
        hot: module folders that are loaded, asked and unloaded all the time, as the server finds
            them below its `server.adapter_root`; it must permit that to everybody.
        seconds_between_samples: how often the server is looked at.
        seed: of the traffic.
        url: a server that runs already; with `pid`, its process on this machine.
        pid: see `url`.
    """

    config: str = "configs/serve/smollm2-135m-soak.yaml"
    overrides: list[str] = field(default_factory=list)
    minutes: float = 30.0
    clients: int = 8
    probes: int = 24
    longest_prompt: int = 400
    longest_answer: int = 48
    hot: list[str] = field(default_factory=list)
    seconds_between_samples: float = 2.0
    seed: int = 0
    url: str = ""
    pid: int = 0

    def __post_init__(self) -> None:
        if bool(self.url) != bool(self.pid):
            raise ConfigError("url and pid go together: of a server that runs already")
        if self.minutes <= 0 or self.clients < 1 or self.probes < 1:
            raise ConfigError("minutes, clients and probes must be positive")
