"""`python -m pshare_jax.train --config FILE.yaml`: trains a decode module.

Exit codes: 0 done; 2 something that cannot be used, explained in one line on standard error; 130
stopped by a signal, with a checkpoint to go on from if one could be written.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from pshare_jax.config_files import load_config
from pshare_jax.errors import PshareError
from pshare_jax.extras import require
from pshare_jax.runtime.host_memory import computes_on_cpus, keep_freed_memory
from pshare_jax.train.config import TrainConfig
from pshare_jax.train.config_check import check_config

_DESCRIPTION = (
    "Trains a decode module on the frozen prefill module's KV. Every key of the configuration file "
    "is a flag too: --optimizer.learning_rate=1e-4. A run that was stopped or killed goes on when "
    "it is started again. SIGINT and SIGTERM save a checkpoint first; a second one ends at once."
)


class _StopSignal:
    """Within its block, remembers the first SIGINT or SIGTERM; a second one ends the process.

    SIGUSR1 is remembered too, however often it comes: batch systems send it before they end a job,
    and `tied` when the process that started this one has ended, once for each of its threads.
    """

    def __init__(self, active: bool):
        self.received = False
        self._numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if active else ()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in self._numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.received = True
        if number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)


def _show(config: TrainConfig) -> None:
    """Prints `config.show` examples, and what the data is like."""
    from pshare_jax.train.inputs import read_inputs
    from pshare_jax.train.report import Reporter
    from pshare_jax.train.show import show_examples

    inputs = read_inputs(config, Reporter(), ask=False)
    rule = None if config.mode == "full" else inputs.rule
    for line in show_examples(inputs.train.examples[: config.show], inputs.tokenizer, rule):
        print(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the training; returns the exit code."""
    args = sys.argv[1:] if argv is None else argv
    try:
        config = load_config(TrainConfig, args, "python -m pshare_jax.train", _DESCRIPTION)
        check_config(config)
        require("train", "training")
        # Imported late: jax takes seconds, which --help and a typing error need not wait for.
        from pshare_jax.train import distributed, loop
        from pshare_jax.train.report import Reporter

        if config.show:
            _show(config)
            return 0
        distributed.start(config)
        import jax

        reporter = Reporter(active=jax.process_index() == 0)
        # One process of several cannot stop on its own.
        with _StopSignal(active=jax.process_count() == 1) as stop:
            try:
                loop.train(config, reporter, lambda: stop.received)
            except loop.StopRequestedError as stopped:
                reporter.say(f"{config.output}: {stopped}")
                return 130
    except PshareError as error:
        print(f"pshare_jax.train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pshare_jax.train: stopped before the first step", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # Set before transformers is imported: nothing here needs the hub's progress bars or forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if computes_on_cpus():
        keep_freed_memory()
    sys.exit(main())
