"""What deploy/ asks of the processes of a cluster: the one table to change with them.

`SERVE` are flags of `pshare serve` beside those of its configuration, `WORKER` those of
`pshare worker` beside the configuration's, `WORKER_PATHS` what a worker process answers without
the token.
"""

COMMANDS = frozenset({"serve", "worker"})
SERVE = frozenset({"--workers", "--token-file", "--launcher"})
WORKER = frozenset({"--role", "--name", "--listen", "--advertise", "--token-file"})
WORKER_PATHS = frozenset({"/health", "/ready", "/metrics"})
ROLES = frozenset({"prefill", "decode", "both"})
LAUNCHERS = frozenset({"local", "ray"})
