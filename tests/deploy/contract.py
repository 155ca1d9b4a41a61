"""What the processes of a cluster take and answer, read off the code, for tests of deploy/."""

from __future__ import annotations

import contextlib
import io
import re
from typing import get_args

from pshare_jax.config import Role, ServeConfig
from pshare_jax.config_files import build_parser
from pshare_jax.serve import __main__ as serve
from pshare_jax.serve import worker, worker_app


def worker_flags() -> frozenset[str]:
    """Flags of `pshare worker` beside those of its configuration."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        worker.main(["--help"])
    return frozenset(re.findall(r"^\s+(--[a-z-]+)", printed.getvalue(), re.MULTILINE))


CONFIG = frozenset(build_parser(ServeConfig, "", "")._option_string_actions)
SERVE = CONFIG | set(serve._SHORT_FLAGS)
WORKER = CONFIG | worker_flags()
WORKER_PATHS = worker_app._PUBLIC
ROLES = frozenset(get_args(Role))
