"""Child side of a child process: guards first, then one entry; messages go up a pipe.

Run as `python -m mlpd.daemon.child ENTRY` with a msgpack request on stdin.  Messages are msgpack
maps on stdout, each after its u32le length: any number of {"kind": "progress" | "block" ...}, then
{"kind": "done", ...} or {"kind": "error", type, code, message, hint}.  stderr is the log.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

import msgpack

from mlpd.core.errors import MlpdError

Send = Callable[[dict[str, Any]], None]
"""Sends one message up; blocks while the parent doesn't read."""

LENGTH = struct.Struct("<I")

ENTRIES = {
    "events": "mlpd.daemon.events_child",
    "cost": "mlpd.daemon.cost_child",
    "history": "mlpd.daemon.history_child",
    "home": "mlpd.daemon.home_child",
    "stats": "mlpd.daemon.stats_child",
    "train": "mlpd.daemon.train_child",
    "reproduce": "mlpd.daemon.reproduce_child",
    "audit": "mlpd.daemon.audit_child",
    "fsck": "mlpd.daemon.fsck_child",
    "backup": "mlpd.daemon.backup_child",
    "model": "mlpd.daemon.model_child",
    "moves": "mlpd.daemon.moves_child",
    "erase": "mlpd.daemon.erase_child",
    "expire": "mlpd.daemon.expire_child",
    "page": "mlpd.daemon.page_child",
    "explain": "mlpd.daemon.explain_child",
    "served": "mlpd.daemon.served_child",
    "drift": "mlpd.daemon.drift_child",
    "performance": "mlpd.daemon.performance_child",
}
"""What may run as a child; each module has `run(request, send) -> result`."""

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the entry named on the command line; returns the exit status."""
    request = msgpack.unpackb(sys.stdin.buffer.read())
    send = _take_stdout()
    _guard(request)
    try:
        result = import_module(ENTRIES[sys.argv[1]]).run(request, send)
    except MlpdError as error:
        send({"kind": "error", "type": type(error).__name__, **error.to_dict()})
        return 1
    except MemoryError:
        traceback.print_exc()
        send({"kind": "error", "type": "MlpdError", **_out_of_memory(request).to_dict()})
        return 1
    except BaseException as error:  # noqa: BLE001 - the parent must hear of any end
        traceback.print_exc()
        send({"kind": "error", "code": "child_failed", "message": repr(error)[:2000]})
        return 1
    send({"kind": "done", "result": result})
    return 0


def _out_of_memory(request: dict[str, Any]) -> MlpdError:
    return MlpdError(
        f"the child {sys.argv[1]!r} needed more than the {request['memory_bytes_max']:,} bytes of "
        "memory that it may have",
        code="out_of_memory",
        hint="Give it fewer rows, or for training raise [training] memory_bytes_max; its log tells "
        "where it was.",
    )


def _take_stdout() -> Send:
    """Keep the pipe for messages and let everything that prints go to the log."""
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        body = msgpack.packb(message)
        pipe.write(LENGTH.pack(len(body)) + body)
        pipe.flush()

    return send


def _guard(request: dict[str, Any]) -> None:
    """Die with the daemon, stay out of serving's way, stay within memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != request["parent_pid"]:
            sys.exit(1)  # the daemon ended before the line above
    os.nice(request["nice"])
    if request["idle"] and hasattr(os, "SCHED_IDLE"):
        # Threads and programs that it starts inherit this.  A thread that wakes takes the processor
        # from an idle one at once, from a nice one only at the end of its slice, 1 to 4 ms.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    limit = request["memory_bytes_max"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
