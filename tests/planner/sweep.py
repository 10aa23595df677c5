"""Measures layouts of a truncated mixture on this machine's GPUs: what a plan says is held against what happens.

    python tests/planner/sweep.py --csv sweep.csv
    python tests/planner/sweep.py --csv sweep.csv --part 2/2

Mixtral 8x7B, six layers of it, on text. Each layout is trained for a few steps, as its router chooses and with tokens
dealt out evenly; what does not fit is a row too. The columns are
those of parallel/evidence/published.py, and what was measured.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from jobs import compose
from jobs.errors import InputError
from jobs.spec import JobSpec
from models.megatron_moe import Router
from orchestrator.worker.data import open_data
from orchestrator.worker.exactness.batches import micro_batches
from orchestrator.worker.main import import_engine
from orchestrator.worker.ranks import Ranks
from parallel.capabilities import why_refused
from parallel.estimates.hardware import hardware
from parallel.evidence.published import COLUMNS
from parallel.layout import Layout

WARM, TIMED = 2, 3
"""Steps of each kind of routing."""

STEPS: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {"recompute": "none"}),
    (2, {"recompute": "full"}),
    (4, {"recompute": "selective", "recompute_modules": ("layernorm",)}),
    (8, {"recompute": "none"}),
)
"""Micro-batch and what is computed again."""

MEASURED = (
    "iter_time_s",
    "tflops_gpu",
    "tflops_kind",
    "mfu_pct",
    "tokens_s_gpu",
    "mem_gb",
    "mem_kind",
    "status",
    "sweep_group",
    "notes",
)

JOB = (
    *("model.layers=6", "cluster=h200_x2", "data=stdlib", "train.sequence_length=4096", "train.global_batch=8"),
    *("train.steps=100", "train.precision=bf16"),
)


def layouts(job: JobSpec) -> Iterator[JobSpec]:
    """Every mesh of one and two GPUs that runs, with each of STEPS."""
    degrees = [{}, *({axis: 2} for axis in ("tp", "dp", "pp", "cp"))]
    experts = [{}, {"ep": 2}, {"etp": 2}]
    for (micro_batch, recompute), mesh, folded in itertools.product(STEPS, degrees, experts):
        fields = dict.fromkeys(("tp", "cp", "pp", "vpp", "dp", "ep", "etp"), 1) | mesh | folded | recompute
        try:
            Layout(**{axis: degree for axis, degree in fields.items() if not axis.startswith("recompute")})
        except InputError:
            continue
        placed = job.model_copy(update={"layout": job.layout.model_copy(update={**fields, "micro_batch": micro_batch})})
        if why_refused(placed) is None:
            yield placed


def measure(rank: int, job: JobSpec) -> dict[str, dict[str, float]]:
    """One rank's part, by routing: seconds of a step, bytes at the most, the busiest expert's load over the mean."""
    layout, device = Layout.of(job.layout), torch.device("cuda", torch.cuda.current_device())
    engine = import_engine(job.engine, "cuda").build(job, layout, device)
    text = open_data(job.data, job.train, job.model.vocab)
    dp = layout.coordinates(rank)["dp"]
    assert job.layout.micro_batch is not None
    as_chosen, step, found = Router.routing, 0, {}
    for routing, routed in (("natural", as_chosen), ("force-balanced", dealt_out)):
        Router.routing = routed
        seconds = []
        for _ in range(WARM + TIMED):
            step += 1
            (whole,) = text.batches(step, 0, 1, job.train.global_batch)
            mine = micro_batches(whole, dp, layout.dp, job.layout.micro_batch)
            torch.cuda.synchronize()
            dist.barrier()
            began = time.perf_counter()
            engine.train_step(step, 1e-4, mine)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        loads: list[torch.Tensor] = []

        def counted(router: Router, *given: Any, routed: Any = routed, loads: Any = loads, **named: Any) -> Any:
            weights, chosen = routed(router, *given, **named)
            loads.append(chosen.sum(0).double())
            return weights, chosen

        Router.routing = counted
        engine.evaluate(mine)
        busiest = max((float(load.max() / load.mean()) for load in loads), default=1.0)
        found[routing] = {"seconds": float(np.median(seconds[WARM:])), "load": busiest}
        found[routing] |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return found


def dealt_out(router: Router, logits: torch.Tensor, padding_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Router.routing`, with the tokens dealt out to the experts in turn."""
    weights, chosen = _as_chosen(router, logits, padding_mask)
    tokens, experts = chosen.shape
    top_k = router.model.top_k
    turns = torch.arange(tokens * top_k, device=chosen.device).view(tokens, top_k) % experts
    kept = weights.sum(-1, keepdim=True) / top_k  # the router still learns, as with its own choice
    return torch.zeros_like(weights).scatter(-1, turns, kept.expand(-1, top_k)), torch.zeros_like(chosen).scatter(
        -1, turns, True
    )


_as_chosen = Router.routing


def rows(ranks: Ranks, number: int, job: JobSpec) -> Iterator[dict[str, Any]]:
    """What is known of a layout: two rows, of each routing; one where it does not fit."""
    layout, model, train = Layout.of(job.layout), job.model, job.train
    said = {
        "split": "validate",
        "source_id": "fivefold-h200",
        "row_id": f"fivefold-h200-{number:04}", "model": "mixtral-8x7b-6layers", "arch": "moe-gqa",
        "layers": model.layers,
        "hidden": model.hidden, "ffn": model.ffn or model.expert_ffn, "heads": model.heads, "kv_heads": model.kv_heads,
        "vocab": model.vocab, "experts": model.experts, "topk": model.top_k, "moe_ffn": model.expert_ffn,
        "shared_experts": 0, "seq_len": train.sequence_length, "gbs": train.global_batch, "mbs": job.layout.micro_batch,
        "gpus": layout.world, "gpu_type": "H200", "gpus_per_node": 2, "precision": "bf16",
        **{axis: layout.degree(axis) for axis in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}, "zero_stage": "1",
        "sp": "yes" if layout.sp else "no", "dispatcher": "alltoall", "attn_kernel": "fused",
        "recompute": {"selective": f"selective: {','.join(job.layout.recompute_modules)}"}.get(
            job.layout.recompute, job.layout.recompute
        ),
        "offload": "none", "framework": "Fivefold on Megatron-Core 0.16.1",
    }  # fmt: skip
    try:
        of_ranks = ranks.run(layout.world, measure, job, seconds=120)
    except (RuntimeError, TimeoutError) as error:
        status = "oom" if "out of memory" in str(error).lower() else "failed"
        yield said | {
            "routing": "natural",
            "status": status,
            "notes": str(error).strip().splitlines()[-1].partition(". Of ")[0],
        }
        return
    flops = model.flops_per_token(train.sequence_length) * train.global_batch * train.sequence_length
    for routing in of_ranks[0]:
        seconds = max(of_rank[routing]["seconds"] for of_rank in of_ranks)
        achieved = flops / seconds / layout.world
        peak = hardware(job.cluster.hardware, job.cluster.devices_per_node).peak_flops("bf16") or 1.0
        worst = max((of_rank[routing] for of_rank in of_ranks), key=lambda found: found["allocated"])
        yield said | {
            "row_id": said["row_id"] + ("" if routing == "natural" else "-balanced"),
            "sweep_group": f"{said['model']}/{routing}",
            "routing": routing,
            "iter_time_s": round(seconds, 5),
            "tflops_gpu": round(achieved / 1e12, 2),
            "tflops_kind": "model",
            "mfu_pct": round(100 * achieved / peak, 2),
            "tokens_s_gpu": round(train.global_batch * train.sequence_length / seconds / layout.world, 1),
            "mem_gb": round(worst["allocated"] / 2**30, 3),
            "mem_kind": "max_allocated GiB (worst rank)",
            "status": "ok",
            "notes": f"reserved {worst['reserved'] / 2**30:.2f} GiB; busiest expert {worst['load']:.2f} of the mean",
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE")
    parser.add_argument("--part", default="1/1", metavar="N/OF", help="the Nth of OF parts of the layouts")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    ranks = Ranks("cuda")
    chosen = list(enumerate(layouts(compose.compose("mixtral_8x7b", JOB)), 1))[part - 1 :: parts]
    print(f"{len(chosen)} layouts", flush=True)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("split", "source_id", *COLUMNS, *MEASURED))
        writer.writeheader()
        for number, job in chosen:
            for found in rows(ranks, number, job):
                writer.writerow(found)
                file.flush()
                options = job.layout
                print(
                    f"{number:4}  {Layout.of(options).label:<12} mb{options.micro_batch} {options.recompute:<9} "
                    f"{found['routing']:<14} {found['status']:<4} {found.get('iter_time_s', '-'):>8} s  "
                    f"{found.get('tflops_gpu', '-'):>7} TFLOP/s  {found.get('mem_gb', '-'):>8} GiB",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
