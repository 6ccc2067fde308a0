"""Ranks as forks of one process that has imported everything: starting them costs next to nothing.

Real processes with the environment that Composer's launcher would give them.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable


def run_forked(ranks: int, function: Callable[[], None]) -> None:
    """Run a function on every rank at once.

    Args:
        ranks: how many processes; this one waits for them.
        function: that finds its rank in the environment.

    Raises:
        SystemExit: if one of them fails; it has printed its error, and the others are stopped.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    running = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(sizes | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            _end_with(function)
        running.add(child)
    failed = False
    while running:
        child, status = os.wait()
        running.remove(child)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, 9)  # it may wait for the one that has failed
    if failed:
        sys.exit(1)


def _end_with(function: Callable[[], None]) -> None:
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
