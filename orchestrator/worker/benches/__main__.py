"""Runs one bench for `python -m orchestrator.worker.benches WHAT`, or `... train JOB LAYOUT MICRO_BATCH STEPS`.

All but `train` and `sharing`, which has two, run on one rank.

Prints JSON lines: {"doing": what is timed now}, one of {"machine": facts}, one of {"ceiling": FLOP/s of a large
product}, and a {"result"} for each way of each work.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from jobs.spec import JobSpec
from orchestrator.worker.benches import sharing, suites
from orchestrator.worker.profiling import machine
from orchestrator.worker.profiling.timing import tell
from orchestrator.worker.ranks import Ranks
from parallel.layout import Layout

IMPORT_SECONDS = 120.0
BENCH_SECONDS = 1200.0
SUITES = {"kernels": suites.kernels, "layer": suites.layer, "offload": suites.activations, "longest": suites.longest}


def main() -> None:
    what, *given = sys.argv[1:]
    kind = "cuda" if torch.cuda.device_count() else "cpu"
    if what == "sharing" and kind == "cuda" and torch.cuda.device_count() < sharing.RANKS:
        sys.exit(f"`sharing` takes {sharing.RANKS} GPUs, between which experts are shared, and one is visible here")
    ranks = Ranks(kind, preload=("orchestrator.worker.benches.suites",))
    facts: dict[str, Any] = ranks.run(1, machine.facts, kind, seconds=IMPORT_SECONDS)[0]
    tell(machine={**facts, "kind": kind})
    if what == "sharing":
        _share(ranks, kind)
        return
    if what == "train":
        job, layout, micro_batch, steps = given
        _train(ranks, kind, job, layout, int(micro_batch), int(steps))
    else:
        ranks.run(1, SUITES[what], kind, seconds=BENCH_SECONDS)


def _share(ranks: Ranks, kind: str) -> None:
    """One mixture after another: what becomes of one does not touch what is known of those before."""
    failed = []
    for name in sharing.SHAPES[kind]:
        tell(doing=name)
        try:
            ranks.run(sharing.RANKS, suites.shared, kind, name, seconds=BENCH_SECONDS)
        except (RuntimeError, TimeoutError) as error:
            print(error, file=sys.stderr)
            failed.append(name)
            tell(result={"work": name, "way": "both", "failed": str(error).strip().splitlines()[-1]})
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _train(ranks: Ranks, kind: str, job: str, layout: str, micro_batch: int, steps: int) -> None:
    """The job and its layout as JSON."""
    spec, degrees = JobSpec.model_validate_json(job), Layout(**json.loads(layout))
    tell(doing=f"{steps} steps of {spec.name}")
    found = ranks.run(degrees.world, suites.train, kind, spec, degrees, micro_batch, steps, seconds=BENCH_SECONDS)
    peaks = [each["seconds"]["peak_bytes"] for each in found]
    slowest = max(found, key=lambda each: each["seconds"]["median"])
    tell(ceiling=slowest.pop("ceiling"))
    slowest["seconds"]["peak_bytes"] = None if None in peaks else max(peaks)
    tell(result={"way": "fivefold", **slowest})


if __name__ == "__main__":
    main()
