"""The server process over the fake engine: `... fake_main TOKENIZER DRAIN PORT [CONTEXT]`.

Prints the URL once it listens and again when it is ready. A file `OPEN` in the tokenizer's folder
lets tokens through; without a file `STARTED` there, warm-up does not end.
"""

import asyncio
import dataclasses
import sys
import threading
import time
from pathlib import Path

from pshare_jax.serve.lifecycle import bind, serve, url_of
from pshare_jax.serve.logs import open_standard_streams, say, set_up
from pshare_jax.text.tokenizer import Tokenizer
from tests.serve.fake import fake_config, fake_engine


def main() -> int:
    open_standard_streams()
    set_up()
    folder = Path(sys.argv[1])
    config = fake_config(drain_seconds=float(sys.argv[2]), port=int(sys.argv[3]))
    if len(sys.argv) > 4:
        config = dataclasses.replace(config, max_model_len=int(sys.argv[4]))
    engine = fake_engine(Tokenizer.load(folder), config)
    engine.gate.clear()
    engine.start_gate.clear()

    def watch() -> None:
        while True:
            for name, gate in [("OPEN", engine.gate), ("STARTED", engine.start_gate)]:
                if (folder / name).exists():
                    gate.set()
            if (folder / "FAIL").exists():
                engine.start_error = RuntimeError("no such device")
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    with bind(config.server) as sock:
        say(url_of(sock), sys.stdout)
        return asyncio.run(serve(engine, sock, lambda url: say(url, sys.stdout)))


if __name__ == "__main__":
    sys.exit(main())
