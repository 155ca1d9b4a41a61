"""`python -m pshare_jax.serve --config FILE.yaml`: the server's command line."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pshare_jax.config import ServeConfig
from pshare_jax.config_files import load_config
from pshare_jax.errors import ConfigError, PshareError
from pshare_jax.serve.logs import open_standard_streams, say, set_up

if TYPE_CHECKING:
    from pshare_jax.serve.engine_api import Engine

_DESCRIPTION = (
    "Serves decode modules over one shared prefill module with OpenAI's HTTP API. Every key of the "
    "configuration file is a flag too: --decode.max_num_seqs=16. --host and --port are short for "
    "--server.host and --server.port; port 0 picks a free one. --launcher=local starts workers "
    "and frontends as processes of their own, --launcher=ray has Ray place them, "
    "--launcher=kubernetes has as many workers there as the load needs; --workers=HOST:PORT,... is "
    "a frontend of workers that run already. SIGTERM drains, a second one ends at once."
)
_INHERITED = "--listen-fd="
"""A socket that listens already, of a launcher; no key of the configuration."""

_SHORT_FLAGS = {
    "--host": "--server.host",
    "--port": "--server.port",
    "--launcher": "--cluster.launcher",
    "--workers": "--cluster.workers",
    "--token-file": "--cluster.token_file",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server; returns the exit code: 2 for a configuration that cannot be served."""
    args = [_expand(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    inherited = [arg for arg in args if arg.startswith(_INHERITED)]
    args = [arg for arg in args if arg not in inherited]
    try:
        listen_fd = int(inherited[-1].removeprefix(_INHERITED)) if inherited else None
        _refuse_secrets(args)
        config = load_config(ServeConfig, args, prog="pshare_jax.serve", description=_DESCRIPTION)
        open_standard_streams()
        set_up()
        # At INFO it lists the platforms that this machine does not have.
        logging.getLogger("jax").setLevel(logging.WARNING)
        # Imported late: jax takes seconds, which --help and a typing error need not wait for.
        from pshare_jax.serve.lifecycle import bind, serve

        if config.cluster.launcher != "none":
            from pshare_jax.serve.launcher import launch

            return launch(config, args)
        with bind(config.server, listen_fd) as sock:
            return asyncio.run(serve(_engine(config), sock, _announce))
    except PshareError as error:
        say(f"pshare_jax.serve: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _engine(config: ServeConfig) -> Engine:
    """Everything in this process, or a frontend of workers elsewhere."""
    if config.cluster.workers:
        from pshare_jax.engine.cluster import ClusterEngine

        return ClusterEngine.from_config(config)
    from pshare_jax.engine.orchestrator import Orchestrator

    return Orchestrator.from_config(config)


def _expand(arg: str) -> str:
    flag, equals, value = arg.partition("=")
    if flag == "--workers":
        value = json.dumps(value.split(","))
    return _SHORT_FLAGS.get(flag, flag) + equals + value


def _refuse_secrets(args: Sequence[str]) -> None:
    if any(arg.partition("=")[0] == "--server.api_key" for arg in args):
        raise ConfigError(
            "--server.api_key: every user of this machine can read command lines; put the key into "
            "the configuration file, into the environment as PSHARE_API_KEY, or into a file that "
            "server.api_keys_file names"
        )


def _announce(url: str) -> None:
    say(f"pshare_jax: ready at {url}", sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
