"""Runs in processes forked from one that has imported everything: starting one takes no time."""

import os
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any


def fork(function: Callable[..., Any], *arguments: Any) -> int:
    """Call a function in a child process; its id."""
    child = os.fork()
    if child:
        return child
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def exit_status(child: int) -> int:
    """Wait for a child; 0, or the negative number of the signal that has ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[int]:
    """Call a function in so many processes as the ranks of a run; their exit statuses.

    The environment is that of Composer's launcher, as far as its `dist` reads it. As there, a rank
    that fails ends the others, which would wait for it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "NODE_RANK": 0}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(count):
        environment = common | {"RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in environment.items()})
        children.append(fork(function, *arguments))
    statuses: dict[int, int] = {}
    while len(statuses) < count:
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if statuses[child]:
            for other in set(children) - set(statuses):
                os.kill(other, signal.SIGKILL)
    return [statuses[child] for child in children]
