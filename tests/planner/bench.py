"""How quickly the planner searches, on one core: `make bench-planner` prints it and keeps it.

Shipped jobs, a dense one and a mixture, on nodes of eight H100s with eight sequences a node and step. A candidate is
a layout with a micro-batch and all its options; an evaluation is an estimate of its memory or, where it fits, of its
time. Of some candidates no estimate is needed: with more sequences at once, or less computed again, they need more
memory than one that is too large. Processor seconds, each search in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from pathlib import Path
from typing import Any

from jobs import compose
from parallel.planning.planner import plan_job

JOBS = ("llama3_70b", "mixtral_8x22b")
NODES = (128, 2048)


def search(name: str, nodes: int) -> dict[str, Any]:
    job = compose.compose(name, ["cluster=h100_x8", f"cluster.nodes={nodes}", f"train.global_batch={8 * nodes}"])
    began = time.process_time()
    found = plan_job(job)
    seconds = time.process_time() - began
    return {
        "job": name,
        "devices": job.cluster.devices,
        "seconds": round(seconds, 2),
        "layouts": found.considered,
        "fit": len(found.plans),
        "candidates": found.candidates,
        "evaluations": found.evaluations,
        "evaluations_per_second": round(found.evaluations / seconds),
        "candidates_per_second": round(found.candidates / seconds),
        "best": found.plans[0].label,
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    searches = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for name in JOBS:
            for nodes in NODES:
                found = fresh.apply(search, (name, nodes))
                searches.append(found)
                print(
                    f"{name:<14} {found['devices']:>6} devices {found['seconds']:>6.1f} s {found['layouts']:>7,} "
                    f"layouts {found['candidates']:>9,} candidates {found['evaluations_per_second']:>8,} evaluations/s"
                    f"  {found['best']}",
                    flush=True,
                )
    machine = {"processor": processor(), "python": platform.python_version(), "system": platform.platform()}
    document = {"command": "make bench-planner", "machine": machine, "searches": searches}
    options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
