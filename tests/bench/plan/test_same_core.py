"""The simulator decides nothing: cores, router, and turns are the engine's own."""

from pshare_jax.bench.plan.system import System
from pshare_jax.cluster.thread import WorkerThread
from pshare_jax.core.decode import DecodeCore
from pshare_jax.core.dispatcher import Dispatcher
from pshare_jax.core.fairness import FairTurns, Share
from pshare_jax.core.prefill import PrefillCore
from tests.bench.plan.test_simulation import spec


def test_its_cores_and_hosts_are_the_engines():
    system = System(spec(engines=(2, 2)))
    assert [type(worker.core) for worker in system.prefill] == [PrefillCore] * 2
    assert [type(worker.core) for worker in system.decode] == [DecodeCore] * 2
    assert {type(server.dispatcher) for server in system._servers} == {Dispatcher}
    assert {type(host._thread) for host in system._host_of.values()} == {WorkerThread}


def test_work_out_of_turn_is_no_credit_for_idle_time():
    turns, busy, idle = FairTurns(), Share(1.0), Share(1.0)
    turns.order([busy, idle])
    for _ in range(2):
        turns.worked(busy, 10.0)
    turns.worked(idle, 0.0)
    assert (busy.virtual_seconds, idle.virtual_seconds) == (20.0, 10.0)
