"""Where ranks are, from outside: their Python and native stacks by py-spy, which needs no word from them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_SECONDS = 10.0


def write_stacks(pids: Mapping[int, int], folder: Path) -> None:
    """A file `rank-R.stack.txt` for each rank, all taken at once; where that may not be done, the file says why."""
    tool = Path(sys.executable).with_name("py-spy")
    folder.mkdir(parents=True, exist_ok=True)
    running = {}
    for rank, pid in pids.items():
        with (folder / f"rank-{rank}.stack.txt").open("w") as file:
            command = [str(tool), "dump", "--nonblocking", "--pid", str(pid)]
            try:
                running[rank] = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
                )
            except OSError as error:
                file.write(f"no stack: {error}\n")
    for process in running.values():
        try:
            process.wait(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
