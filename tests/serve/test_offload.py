import asyncio
import threading

import pytest

from pshare_jax.errors import QueueFullError
from pshare_jax.serve import offload
from pshare_jax.serve.offload import Offload


async def test_work_is_done_beside_the_loop_and_small_work_at_once():
    pool = Offload(1)
    here = threading.get_ident()
    assert await pool.run(False, threading.get_ident) != here
    assert await pool.run_if(False, threading.get_ident) == here
    assert await pool.run_if(True, pow, 2, exp=5) == 32
    with pytest.raises(ZeroDivisionError):
        await pool.run(False, divmod, 1, 0)
    pool.close()


async def test_no_more_than_so_many_wait(monkeypatch):
    monkeypatch.setattr(offload, "MAX_WAITING", 3)
    pool, gate = Offload(1), threading.Event()
    tasks = [asyncio.ensure_future(pool.run(True, gate.wait)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="3 requests wait"):
        await pool.run(True, gate.wait)
    tasks.pop().cancel()  # one that has not begun gives its place back
    await asyncio.sleep(0)
    tasks.append(asyncio.ensure_future(pool.run(True, gate.wait)))
    await asyncio.sleep(0)
    # Small work waits for none of them.
    assert await pool.run(False, pow, 2, 5) == 32
    gate.set()
    assert await asyncio.gather(*tasks) == [True] * 3
    assert await pool.run(True, gate.wait)
    pool.close()
