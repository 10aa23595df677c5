"""A billion-parameter MoE on GPUs: what snapshots cost it, and how soon it trains on after a fault."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from bench import lines, machine

FAULTS = {25: "kill", 45: "stop", 65: "held_lock", 85: "out_of_memory"}
"""By step. The last is answered by another layout."""
INTERVAL = 10
SETTLED = 20
"""Steps after which steps are timed."""
SECONDS = 300.0


def train(root: Path, *overrides: str) -> Path:
    """The folder of a run of moe_1b that came to its end."""
    before = set(root.glob("*/job.json"))
    command = [sys.executable, "-m", "orchestrator.cli", "run", "moe_1b", "--run-root", str(root), *overrides]
    ended = subprocess.run([*command, "checkpoint.interval=0"], capture_output=True, text=True, timeout=SECONDS)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}")
    (made,) = set(root.glob("*/job.json")) - before
    return made.parent


def seconds_a_step(run: Path) -> dict[int, float]:
    """By step, from the report of the one before to its own, so that all that delays it is in it; not of the last."""
    at = {line["step"]: line["at"] for line in lines(run / "metrics.jsonl")}
    return {step: at[step] - at[step - 1] for step in at if SETTLED < step < max(at)}


def added(seconds: dict[int, float]) -> float:
    """By snapshots, of a step's time: the steps behind each against the later ones before the next."""
    behind, later = (
        [seconds[step] for step in seconds if (step % INTERVAL in range(1, 5)) is near] for near in (True, False)
    )
    return (mean(behind) / mean(later) - 1) * 4 / INTERVAL


def snapshots(root: Path, cluster: str, steps: int) -> dict[str, Any]:
    """Runs without and with, in turn: the mean step of each, and what a snapshot adds to the steps behind it."""
    found: dict[int, list[float]] = {0: [], INTERVAL: []}
    costs: dict[int, list[float]] = {0: [], INTERVAL: []}
    for interval in (0, INTERVAL, INTERVAL, 0):
        run = train(root, cluster, f"train.steps={steps}", f"checkpoint.snapshot_interval={interval}")
        seconds = seconds_a_step(run)
        found[interval].append(mean(seconds.values()))
        costs[interval].append(added(seconds))
        print(
            f"snapshots every {interval or 'no'} steps: {found[interval][-1] * 1e3:.1f} ms a step, "
            f"those behind a snapshot add {costs[interval][-1]:.2%}",
            flush=True,
        )
    cost = mean(found[INTERVAL]) / mean(found[0]) - 1
    print(f"snapshots every {INTERVAL} steps cost {cost:.2%} of a step between runs")
    return {"interval": INTERVAL, "mean_step_seconds": found, "added_within_a_run": costs, "cost_between_runs": cost}


def faults(root: Path, cluster: str) -> list[dict[str, Any]]:
    chaos = ", ".join(f"{{kind: {kind}, rank: 0, step: {step}}}" for step, kind in FAULTS.items())
    run = train(
        root,
        cluster,
        "train.steps=100",
        f"checkpoint.snapshot_interval={INTERVAL}",
        "policy.max_restarts=9",
        f"chaos=[{chaos}]",
    )
    events, metrics = lines(run / "events.jsonl"), lines(run / "metrics.jsonl")
    rows = []
    for fault in (event for event in events if event["kind"] == "fault_injected"):
        later = [event for event in events if event["at"] > fault["at"]]
        found = next(event for event in later if event["kind"] == "attempt_failed")
        began = next(event for event in later if event["kind"] == "training_started")
        step = next(line for line in metrics if line["at"] > began["at"])
        rows.append(
            {
                "fault": FAULTS[fault["data"]["step"]],
                "step": fault["data"]["step"],
                "found": found["message"].split("; stacks in")[0],
                "found_seconds": found["at"] - fault["at"],
                "next_step_seconds": step["at"] - fault["at"],
                "first_step_seconds": step["at"] - began["at"],
                "steps_lost": fault["data"]["step"] - 1 - began["data"]["start_step"],
                "from_memory": began["data"]["from_memory"],
                "build_seconds": began["data"]["build_seconds"],
                "restore_seconds": began["data"]["restore_seconds"],
            }
        )
        row = rows[-1]
        attempt = run / f"logs/attempt-{found['attempt']}"
        row["evidence"] = {path.name: path.stat().st_size for path in sorted(attempt.glob("rank-0.[sc]*"))}
        seconds = f"found {row['found_seconds']:6.2f} s  next step {row['next_step_seconds']:6.2f} s"
        print(
            f"{row['fault']:<16}{seconds}  steps lost {row['steps_lost']}  from memory: {row['from_memory']}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="GPUs of this machine to train on")
    parser.add_argument("--steps", type=int, default=71, metavar="N", help="of each run that times steps")
    parser.add_argument("--json", metavar="FILE", help="where the figures are kept")
    options = parser.parse_args()
    cluster = f"cluster.devices_per_node={options.devices}"
    gpu = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    document = {"machine": {**machine(), "gpu": gpu.stdout.splitlines()[0]}, "devices": options.devices}
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="5f-") as name:
        document["faults"] = faults(Path(name), cluster)
        keep(document, options.json)
        document["snapshots"] = snapshots(Path(name), cluster, options.steps)
        keep(document, options.json)


def keep(document: dict[str, Any], file: str | None) -> None:
    if file:
        Path(file).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
