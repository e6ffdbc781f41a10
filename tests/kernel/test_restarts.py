"""Restarts, kills and reloads under traffic, at any moment of a start, counted at sockets."""

import random
import signal
import time

import pytest

pytestmark = pytest.mark.kernel

OPEN, CLOSED = 7000, 7001
POLICY = f"""
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {{name: base}}
spec:
  nodeSelector: {{}}
  ingress: [{{toPorts: [{{ports: [{{port: "{OPEN}", protocol: ANY}}]}}]}}]
"""


@pytest.mark.parametrize("restarts", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_restarts_under_traffic_leak_nothing_and_cut_nothing(machine, restarts):
    """Most daemons do not get to the end of their start; every tenth does, and the last one."""
    chance = random.Random(restarts)  # noqa: S311 - the same in every run
    machine.enforce(POLICY)
    machine.until(lambda: not machine.connects(CLOSED))
    before = machine.generation()
    with machine.traffic(OPEN, CLOSED) as seen:
        for number in range(restarts):
            how = chance.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
            if how is signal.SIGHUP and machine.daemon is not None:
                machine.daemon.send_signal(signal.SIGHUP)
                time.sleep(chance.uniform(0, 0.3))
                how = signal.SIGTERM
            machine.stop(how)
            machine.start()
            if number % 10 == 9 or number == restarts - 1:
                reached = machine.generation()
                machine.until(lambda: machine.generation() > reached, 60)  # noqa: B023 - called at once
            else:
                time.sleep(chance.uniform(0, 1.2))  # a start takes about one
    assert machine.generation() > before
    assert seen.sent > 50 * restarts
    assert seen.echoed > 5 * restarts
    assert (seen.leaked, seen.sent - seen.arrived, seen.cut) == (0, 0, "")
