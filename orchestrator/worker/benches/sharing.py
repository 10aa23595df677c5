"""Experts that ranks share (FSSDP) beside plain expert parallelism: whole steps of both in turn, on the same ranks.

Both have one layout, and so one set of Megatron's groups: a process holds both engines, and what a device does
meanwhile befalls both. Routing is given: the router's own choice, or one whose loads are known, in which its weights
still learn.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer

from jobs.compose import compose
from jobs.spec import JobSpec
from models.megatron_moe import Router
from models.sparse_experts import SparseExperts
from orchestrator.worker.data import Data, open_data
from orchestrator.worker.engines.megatron import MegatronEngine, build
from orchestrator.worker.profiling.timing import tell
from parallel.estimates.costs import estimate_time
from parallel.estimates.hardware import hardware
from parallel.estimates.loads import Recorded
from parallel.estimates.traces import inclusion, wandering
from parallel.estimates.workload import Workload
from parallel.fssdp import WINDOW
from parallel.fssdp_means import unshared
from parallel.layout import Layout

RANKS = 2
WAYS = ("ep", "fssdp")
FASTER, BALANCED, BUSIEST = 1.3, 0.98, 1.1
"""The bars: of uneven routing steps are so many times as fast as expert parallelism's, of even routing hardly slower;
and the busiest rank of a layer has no more than so much of the mean, with Zipf's loads."""

NATURAL, EVEN, SHUFFLED, WORST = "natural", "balanced", "Zipf 1.0", "Zipf 1.0, heaviest first"
TIMED = {"cuda": 10, "cpu": 2}
LEARNING_RATE = 1e-5

SHAPES: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {
        # Behind attention of fewer tokens the link moves no expert of Mixtral's 352 MB; with half as many of Qwen3 the
        # host decides how fast a step is, and not the devices.
        "mixtral_8x7b": ("model=mixtral_8x7b", "model.layers=3", "layout.micro_batch=4"),
        "qwen3_30b_a3b": ("model=qwen3_30b_a3b", "model.layers=6", "layout.micro_batch=8"),
    },
    "cpu": {"small": ("model=quickstart", "model.layers=2", "layout.micro_batch=2")},
}
SIZES = {
    "cuda": (
        *("model.vocab=32000", "cluster=h200_x2", "train.sequence_length=4096"),
        *("train.global_batch=32", "train.precision=bf16"),
    ),
    "cpu": (
        *("cluster=laptop", "train.sequence_length=64", "train.global_batch=8"),
        *("train.precision=fp32", "layout.expert_copies=2", "data.files=[stdlib:json/*.py]"),
    ),
}


def job_of(kind: str, name: str, way: str) -> JobSpec:
    degrees = dict.fromkeys(("tp", "pp", "vpp", "cp", "etp"), 1) | dict.fromkeys(("dp", "ep"), RANKS)
    layout = (f"layout.{axis}={degree}" for axis, degree in degrees.items())
    # Copies are a matter of both: expert parallelism has none.
    sizes = (each for each in SIZES[kind] if way == "fssdp" or "expert_copies" not in each)
    asked = (*SHAPES[kind][name], *sizes, *layout, "layout.recompute=none", f"layout.expert_parallelism={way}")
    return compose("moe_1b", asked)


@dataclass(frozen=True)
class Steps:
    """Of one way and routing, over all ranks."""

    seconds: list[float]
    """Of the slowest rank."""
    rows: torch.Tensor
    """[timed steps, micro-batches * layers, ranks]: computed there."""
    loads: Recorded
    """Of the steps that were not timed too."""
    copies: float
    """Of a layer, in the mean."""


class Watched:
    """An engine, and what its layers compute and copy in a step."""

    def __init__(self, engine: MegatronEngine, modules: Sequence[MoELayer]) -> None:
        self.engine = engine
        self.rows: list[int] = []
        self._experts = [module.experts for module in modules]
        for each in self._experts:
            seen = each.arrivals if isinstance(each, SparseExperts) else each
            seen.register_forward_pre_hook(lambda _, given: self.rows.append(given[0].shape[0]))

    @property
    def copies(self) -> float:
        """Of a layer, in the step before."""
        shared = [each.placement.copies for each in self._experts if isinstance(each, SparseExperts)]
        return statistics.fmean(shared) if shared else 0.0


class Routing:
    """What routers choose, of all models of this process, and how many tokens each expert had of it."""

    def __init__(self) -> None:
        self.loads: list[torch.Tensor] = []
        self.likely: torch.Tensor | None = None
        """[layers, experts + 1], running sums of how likely a token is to choose each; None: as the router does."""
        self._own = Router.routing

    def install(self) -> None:
        routing = self

        def routed(
            router: Router, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if routing.likely is None:
                weights, chosen = routing._own(router, logits, padding_mask)
            else:
                weights, chosen = given(router, logits, routing.likely[router.layer_number - 1])
            routing.loads.append(chosen.sum(0))
            return weights, chosen

        Router.routing = routed  # type: ignore[method-assign]


def given(router: Router, logits: torch.Tensor, likely: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Router.routing`: choices whose loads follow `likely`, running sums [experts + 1], and the router's weights.

    Systematic sampling (Madow 1949): a token chooses the experts in whose part of the sums a grid of step 1 falls; the
    grids of tokens are evenly apart (multiples of the golden ratio), so that loads are those asked for to within a few.
    """
    model, flat = router.model, logits.flatten(0, 1)
    at = torch.arange(len(flat), device=flat.device, dtype=torch.float64) * 0.6180339887498949
    edges = (likely[None, :] - (at - at.floor())[:, None]).floor()
    chosen = edges[:, 1:] > edges[:, :-1]
    scores = flat.softmax(-1) if model.router_score == "softmax" else flat.sigmoid()
    weights = scores * chosen
    if model.router_normalize_top_k:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * model.router_scale, chosen


def traces(routing: str, job: JobSpec, steps: int) -> torch.Tensor | None:
    """Running sums, float64 [steps, layers, experts + 1]; None where the router chooses."""
    model = job.model
    if routing == NATURAL:
        return None
    if routing == EVEN:
        shares = np.full((steps, model.layers, model.experts), 1 / model.experts)
    else:
        layers = (
            wandering(np.random.default_rng(1 + layer), model.experts, 1.0, heaviest_first=routing == WORST)
            for layer in range(model.layers)
        )
        shares = np.stack([list(itertools.islice(layer, steps)) for layer in layers], 1)
    likely = [[inclusion(layer, model.top_k) for layer in step] for step in shares]
    sums = np.cumsum(likely, -1)
    sums[..., -1] = model.top_k  # to the last bit: each token chooses as many
    return torch.from_numpy(np.concatenate((np.zeros_like(sums[..., :1]), sums), -1))


def measure(rank: int, kind: str, name: str, device: torch.device) -> None:
    """Tell of each routing what both ways take of it, and what the plan says."""
    jobs = {way: job_of(kind, name, way) for way in WAYS}
    layout, routing = Layout.of(jobs["ep"].layout), Routing()
    routing.install()
    why = unshared(jobs["fssdp"])
    if rank == 0 and why is not None:
        tell(result={"work": name, "way": "fssdp", "failed": why})
    engines = [build(jobs["ep"], layout, device), MegatronEngine(jobs["fssdp"], layout, device)]
    watched = {way: Watched(engine, mixtures(engine)) for way, engine in zip(WAYS, engines, strict=True)}
    data = open_data(jobs["ep"].data, jobs["ep"].train, jobs["ep"].model.vocab)
    first = 1
    for each in (EVEN, WORST, NATURAL, SHUFFLED):
        if rank == 0:
            tell(doing=f"{name}, {each}")
        steps = range(first, first + WINDOW + TIMED[kind])
        first = steps.stop
        found = Runs(jobs["ep"], layout, rank, device, data, routing).of(each, watched, steps)
        if rank == 0:
            for result in results(name, each, jobs, found, device):
                tell(result=result)


def mixtures(engine: MegatronEngine) -> list[MoELayer]:
    return [module for model in engine._models for module in model.modules() if isinstance(module, MoELayer)]


@dataclass(frozen=True)
class Runs:
    """Steps of one rank."""

    job: JobSpec
    layout: Layout
    rank: int
    device: torch.device
    data: Data
    routing: Routing

    def of(self, routing: str, watched: dict[str, Watched], steps: range) -> dict[str, Steps]:
        """Both ways' steps, those that are timed in turn."""
        sums = traces(routing, self.job, len(steps))
        sums = None if sums is None else sums.to(self.device)
        seconds: dict[str, list[float]] = {way: [] for way in watched}
        copies: dict[str, list[float]] = {way: [] for way in watched}
        rows: dict[str, list[list[int]]] = {way: [] for way in watched}
        loads: dict[str, list[torch.Tensor]] = {way: [] for way in watched}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for number, step in enumerate(steps):
            self.routing.likely = None if sums is None else sums[number]
            for way, each in watched.items():
                # Only what copies experts looks back; both learn alike from what their routers choose.
                if way == "ep" and number < WINDOW - 1 and routing != NATURAL:
                    continue
                each.rows.clear()
                self.routing.loads.clear()
                seconds[way].append(self._seconds(each.engine, step))
                rows[way].append(list(each.rows))
                loads[way].append(torch.stack(self.routing.loads))
                copies[way].append(each.copies)
        timed = len(steps) - WINDOW
        return {
            way: Steps(
                self._gathered(seconds[way][-timed:]).amax(-1).tolist(),
                self._gathered(rows[way][-timed:]),
                self._summed(torch.stack(loads[way])),
                statistics.fmean(copies[way][-timed:]),
            )
            for way in watched
        }

    def _seconds(self, engine: MegatronEngine, step: int) -> float:
        micro_batch = self.job.layout.micro_batch
        assert micro_batch is not None
        batches = self.data.batches(step, self.layout.coordinates(self.rank)["dp"], self.layout.dp, micro_batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        engine.train_step(step, LEARNING_RATE, batches)  # ends with figures that the host has read
        return time.perf_counter() - start

    def _gathered(self, mine: Any) -> torch.Tensor:
        """[..., ranks]"""
        own = torch.tensor(mine, dtype=torch.float64, device=self.device)
        every = own.new_empty(RANKS, *own.shape)
        dist.all_gather_into_tensor(every.view(-1), own.view(-1))
        return every.movedim(0, -1).cpu()

    def _summed(self, loads: torch.Tensor) -> Recorded:
        """loads [steps, micro-batches * layers, experts] of this rank, layers innermost."""
        loads = loads.unflatten(1, (-1, self.job.model.layers)).sum(1)
        dist.all_reduce(loads)
        return Recorded(tuple(tuple(map(tuple, step)) for step in loads.tolist()))


def results(
    name: str, routing: str, jobs: dict[str, JobSpec], found: dict[str, Steps], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Of each way its figures; of the one that shares, beside the other's, what was promised and predicted."""
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    medians, predicted, busiest = {}, {}, {}
    for way, steps in found.items():
        job, median = jobs[way], statistics.median(steps.seconds)
        medians[way], predicted[way] = median, expected(job, steps.loads)
        tokens = job.train.global_batch * job.train.sequence_length
        over_mean = steps.rows.amax(-1) / steps.rows.mean(-1)
        busiest[way] = float(over_mean.mean())
        heaviest = [max(layer) / sum(layer) for step in steps.loads.samples[-len(steps.seconds) :] for layer in step]
        result = {
            "work": name,
            "load": routing,
            "way": way,
            "layers": job.model.layers,
            # One process holds both, so that this is what both take.
            "seconds": {
                "median": median,
                "low": min(steps.seconds),
                "high": max(steps.seconds),
                "peak_bytes": peak,
            },
            "all_seconds": steps.seconds,
            "devices": RANKS,
            "sequences": job.train.global_batch,
            "flops_per_second": job.model.flops_per_token(job.train.sequence_length) * tokens / median / RANKS,
            "tokens_per_second": tokens / median,
            "busiest": {"mean": busiest[way], "worst": float(over_mean.max())},
            "heaviest_expert": statistics.fmean(heaviest),
            "copies": steps.copies,
            "predicted_seconds": predicted[way],
        }
        if way == "fssdp":
            result["sharing"] = verdict(routing, medians, predicted, busiest)
        yield result


def verdict(
    routing: str, medians: dict[str, float], predicted: dict[str, float], busiest: dict[str, float]
) -> dict[str, Any]:
    speedup, foreseen = medians["ep"] / medians["fssdp"], predicted["ep"] / predicted["fssdp"]
    bar = BALANCED if routing == EVEN else FASTER
    return {
        "seconds": medians,
        "predicted_seconds": predicted,
        "speedup": speedup,
        "predicted_speedup": foreseen,
        "error": foreseen / speedup - 1,
        "bar": bar,
        "met": speedup >= bar,
        "busiest_bar": BUSIEST,
        "busiest": busiest,
        "evened_out": busiest["fssdp"] <= BUSIEST if routing in (SHUFFLED, WORST) else None,
    }


def expected(job: JobSpec, loads: Recorded) -> float:
    """Seconds of a step, as a plan has them of exactly these loads."""
    workload = Workload.of(job, Layout.of(job.layout), job.layout.micro_batch or 1)
    device = hardware(job.cluster.hardware, job.cluster.devices_per_node)
    return estimate_time(replace(workload, load=loads), device).total
