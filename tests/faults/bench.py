"""From a fault to its notice and to the next trained step: under torchrun, Ray Train v2 and Fivefold, side by side."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
FAULTS = {"kill": "SIGKILL of a rank", "stop": "SIGSTOP of a rank", "held_lock": "interpreter lock held"}
START_SECONDS = 90.0
Told = list[dict[str, Any]]


def commands(system: str, folder: Path, fault: str) -> list[str]:
    loop = str(HERE / "loop.py")
    if system == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        return [*torchrun, "--max-restarts=3", loop, system, str(folder), fault]
    if system == "ray_train":
        return [sys.executable, loop, system, str(folder), fault]
    injected = f"chaos=[{{kind: {fault}, rank: 1, step: 20}}]"
    job = [str(PROJECT / "tests/e2e/tiny.yaml"), "train.steps=60", "checkpoint.interval=5", injected]
    return [sys.executable, "-m", "orchestrator.cli", "run", *job, "--run-root", str(folder)]


def read(system: str, folder: Path) -> tuple[Told, Told, Told]:
    """The fault, what was noticed or restarted, and the steps."""
    if system == "fivefold":
        run = next((path for path in folder.glob("*/events.jsonl")), None)
        events = [] if run is None else lines(run)
        steps = [] if run is None else lines(run.with_name("metrics.jsonl"))
        by_kind = [
            [event for event in events if event["kind"] == kind] for kind in ("fault_injected", "attempt_failed")
        ]
        return by_kind[0], by_kind[1], steps
    told = lines(folder / "told.jsonl")
    fault, lives, steps = ([each for each in told if each["kind"] == kind] for kind in ("fault", "life", "step"))
    return fault, lives, steps


def lines(path: Path) -> Told:
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return []


def measure(system: str, fault: str, limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="5f-") as name:
        folder = Path(name)
        paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"RAY_TRAIN_V2_ENABLED": "1", "OMP_NUM_THREADS": "1", "RAY_TMPDIR": name}
        process = subprocess.Popen(
            commands(system, folder, fault),
            env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return watch(system, folder, process, limit) | {"system": system, "fault": fault}
        finally:
            end(process)


def watch(system: str, folder: Path, process: subprocess.Popen[bytes], limit: float) -> dict[str, Any]:
    """Seconds after the fault; None where it did not happen within `limit`."""
    deadline = time.time() + START_SECONDS
    while time.time() < deadline:
        over = process.poll() is not None
        faults, notices, steps = read(system, folder)
        if faults:
            at = faults[0]["at"]
            deadline = at + limit
            noticed = [each["at"] - at for each in notices if each["at"] > at]
            # Ranks that the fault has not reached yet end the step that they are in: a life after it counts.
            trained = [each["at"] - at for each in steps if noticed and each["at"] - at > noticed[0]]
            if trained:
                return {"noticed_seconds": noticed[0], "next_step_seconds": trained[0]}
        if over:
            break
        time.sleep(0.02)
    faults, notices, _ = read(system, folder)
    if not faults:
        raise RuntimeError(f"{system} did not come to the fault within {START_SECONDS:.0f} s")
    noticed = [each["at"] - faults[0]["at"] for each in notices if each["at"] > faults[0]["at"]]
    return {"noticed_seconds": next(iter(noticed), None), "next_step_seconds": None}


def end(process: subprocess.Popen[bytes]) -> None:
    """The command and all that it started, stopped ones too."""
    ours: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        ours = [parent, *parent.children(recursive=True)]
    for each in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    process.wait(10)


def machine() -> dict[str, Any]:
    return {
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "ray", "megatron-core")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help="waited for a next step")
    parser.add_argument("--json", metavar="FILE", help="where the figures are kept")
    options = parser.parse_args()
    rows = []
    print(f"{'fault':<24}{'system':<12}{'noticed':>10}{'next step':>12}")
    for fault, text in FAULTS.items():
        for system in ("torchrun", "ray_train", "fivefold"):
            row = measure(system, fault, options.limit)
            rows.append(row)
            said = [row[key] for key in ("noticed_seconds", "next_step_seconds")]
            shown = [f"not in {options.limit:.0f}" if each is None else f"{each:.2f} s" for each in said]
            print(f"{text:<24}{system:<12}{shown[0]:>10}{shown[1]:>12}", flush=True)
    if options.json:
        document = {"machine": machine(), "limit_seconds": options.limit, "rows": rows}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
