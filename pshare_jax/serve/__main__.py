"""`python -m pshare_jax.serve --config FILE.yaml`: the server's command line."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence

from pshare_jax.config import ServeConfig, load_config
from pshare_jax.errors import ConfigError, PshareError
from pshare_jax.serve.logs import open_standard_streams, say, set_up

_DESCRIPTION = (
    "Serves decode modules over one shared prefill module with OpenAI's HTTP API. Every key of the "
    "configuration file is a flag too: --decode.max_num_seqs=16. --host and --port are short for "
    "--server.host and --server.port; port 0 picks a free one. SIGTERM drains, a second one ends "
    "at once."
)
_SHORT_FLAGS = {"--host": "--server.host", "--port": "--server.port"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server; returns the exit code: 2 for a configuration that cannot be served."""
    args = [_expand(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    try:
        _refuse_secrets(args)
        config = load_config(ServeConfig, args, prog="pshare_jax.serve", description=_DESCRIPTION)
        open_standard_streams()
        set_up()
        # At INFO it lists the platforms that this machine does not have.
        logging.getLogger("jax").setLevel(logging.WARNING)
        # Imported late: jax takes seconds, which --help and a typing error need not wait for.
        from pshare_jax.serve.lifecycle import bind, serve

        with bind(config.server) as sock:
            from pshare_jax.engine.orchestrator import Orchestrator

            engine = Orchestrator.from_config(config)
            return asyncio.run(serve(engine, sock, _announce))
    except PshareError as error:
        say(f"pshare_jax.serve: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _expand(arg: str) -> str:
    flag, equals, value = arg.partition("=")
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
