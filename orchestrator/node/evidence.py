"""Where ranks are, from outside: stacks by py-spy, which needs no word from them, and NCCL's record of collectives.

NCCL's own thread writes the record where it is asked through a pipe. It wants the interpreter's lock for a moment, so a
rank that holds it gives no record, nor does one that is stopped. Read it with `torchfrtrace`; it is a pickle, and
nothing here loads it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

_STACK_SECONDS = 10.0
_RECORD_SECONDS = 2.0
_RECORDED = "2000"
"""Collectives that a rank remembers."""


def record_collectives() -> None:
    """Have this process, a rank to be, keep a record of its collectives. Before NCCL is first used.

    The pipe lies in the node's own temporary folder, since a run's may be on a filesystem that has none.
    """
    forget_record(os.getpid())  # of an earlier process of this number
    folder = _folder(os.getpid())
    try:
        folder.mkdir(mode=0o700)
    except OSError:  # somebody else's, or a full disk: a rank trains without a record
        return
    os.environ |= {
        "TORCH_FR_BUFFER_SIZE": _RECORDED,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": f"{folder}/ask-",
        "TORCH_FR_DUMP_TEMP_FILE": f"{folder}/record-",
    }


def forget_record(pid: int) -> None:
    """Of a rank that has ended."""
    shutil.rmtree(_folder(pid), ignore_errors=True)


def gather(pids: Mapping[int, int], folder: Path) -> None:
    """By rank, `rank-R.stack.txt` and, of NCCL, `rank-R.collectives`, all taken at once.

    A stack's file says why where none may be had. Takes up to ten seconds, of ranks that do not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = {rank: pid for rank, pid in pids.items() if _ask(rank, pid)}
    _stacks(pids, folder)
    until = time.monotonic() + _RECORD_SECONDS
    while asked and time.monotonic() < until:
        for rank, pid in list(asked.items()):
            if _take(rank, pid, folder):
                del asked[rank]
        time.sleep(0.05)


def _folder(pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"fivefold-rank-{pid}"


def _ask(rank: int, pid: int) -> bool:
    """Whether somebody listens."""
    try:
        pipe = os.open(_folder(pid) / f"ask-{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    with os.fdopen(pipe, "wb", buffering=0) as file, contextlib.suppress(OSError):
        file.write(b"1\n")
    return True


def _take(rank: int, pid: int, folder: Path) -> bool:
    """Whether the record is there and has not grown since it was last seen to be as long."""
    record, copy = _folder(pid) / f"record-{rank}", folder / f"rank-{rank}.collectives"
    try:
        length = record.stat().st_size
        if not length or not copy.exists() or copy.stat().st_size != length:
            shutil.copyfile(record, copy)
            return False
    except OSError:
        return False
    return True


def _stacks(pids: Mapping[int, int], folder: Path) -> None:
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    tool = shutil.which("py-spy", path=beside) or "py-spy"
    running = {}
    for rank, pid in pids.items():
        with (folder / f"rank-{rank}.stack.txt").open("w") as file:
            command = [tool, "dump", "--nonblocking", "--pid", str(pid)]
            try:
                running[rank] = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
                )
            except OSError as error:
                file.write(f"no stack: {error}\n")
    for process in running.values():
        try:
            process.wait(timeout=_STACK_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
