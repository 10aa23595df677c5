"""From a job to the layouts that run it, fastest first, and an account of those that do not. Pure arithmetic."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from jobs.spec import DEGREES, JobSpec
from parallel.estimates.costs import TimeEstimate, estimate_time, least_time
from parallel.estimates.hardware import Hardware, hardware
from parallel.estimates.memory import MemoryEstimate, estimate_memory
from parallel.estimates.software import Software, spread
from parallel.estimates.swapping import settled
from parallel.estimates.workload import Workload
from parallel.layout import Layout
from parallel.planning import options
from parallel.planning.refusals import nothing_runs
from parallel.planning.search import Fit, Rejection, Search


@dataclass(frozen=True)
class Plan:
    """A layout that runs, with its fastest micro-batch and options that fit."""

    layout: Layout
    micro_batch: int
    options: dict[str, Any]
    """Of LayoutSpec, by jobs.spec.SIMPLEST; where the job has activations swapped `offload_activations` too: the share
    of the tokens, or None where it is auto and host memory holds too little."""
    micro_batches: int
    """Micro-batches that each rank computes in a step."""
    memory: MemoryEstimate
    p_out_of_memory: float
    """That the device's memory does not hold it."""
    time: TimeEstimate
    interval: tuple[float, float]
    """Seconds between which a step lies in nine cases of ten."""
    tokens_per_second: float
    mfu: float | None
    """Model FLOPs over the device's peak; None where no peak is known."""

    @property
    def label(self) -> str:
        """Degrees above 1 and options that are not the simplest: `tp2 pp4 vpp2, recompute layernorm`."""
        return ", ".join(filter(None, (self.layout.label, options.label(self.options))))

    def as_dict(self) -> dict[str, Any]:
        """For plan.json: names with units, parts beside their totals."""
        return {
            "layout": self.layout.as_dict(),
            "options": self.options,
            "micro_batch": self.micro_batch,
            "micro_batches": self.micro_batches,
            "step_seconds": self.time.total,
            "step_seconds_interval": list(self.interval),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "p_out_of_memory": self.p_out_of_memory,
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            "time_seconds": {**asdict(self.time), "total": self.time.total},
        }


@dataclass(frozen=True)
class Planning:
    """`plans` fastest first. `considered` counts layouts; a refused attention mesh counts once."""

    plans: tuple[Plan, ...]
    rejections: tuple[Rejection, ...]
    considered: int
    candidates: int = 0
    """Layouts with a micro-batch and all options that the engine runs."""
    evaluations: int = 0
    """Estimates of a candidate's memory or time that it took to decide on all of them."""


def plan_job(job: JobSpec, device: Hardware | None = None) -> Planning:
    """Every layout of the job on its cluster that the engine runs and memory holds; fixed degrees are kept.

    The product of tp, cp, dp and pp is the number of the cluster's devices, or less where the job fixes all four.
    `device` is a profile to plan with in place of the cluster's own. InputError where nothing is left: why, class by
    class, and the nearest choice that runs.
    """
    search = Search(job, device or device_of(job))
    with _no_cycles():
        plans = [_fastest(fits, search.device) for _, fits in search.fitting()]
    rejections = tuple(sorted(search.rejections.values(), key=lambda rejection: -rejection.count))
    if not plans:
        raise nothing_runs(search, rejections)
    # Of equals, the layout that cuts the model least.
    plans.sort(key=lambda plan: (plan.time.total, *_cuts(plan.layout)))
    considered = len(plans) + sum(rejection.count for rejection in rejections)
    return Planning(tuple(plans), rejections, considered, search.candidates, search.evaluations)


@contextmanager
def _no_cycles() -> Iterator[None]:
    """What a search makes has none, and looking for them again and again takes a sixth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _fastest(fits: list[Fit], device: Hardware) -> Plan:
    """The best way to run a layout; of equally fast ones the first, which is the simplest."""
    bounds = sorted((least_time(fit.workload, device), place) for place, fit in enumerate(fits))
    least, chosen, time = inf, 0, None
    for bound, place in bounds:
        if bound > least:
            break
        estimate = estimate_time(fits[place].workload, device)
        if (total := estimate.total) < least or (total == least and place < chosen):
            least, chosen, time = total, place, estimate
    assert time is not None
    best = fits[chosen]
    return _plan(best.job, best.workload, estimate_memory(best.workload, device), time, device)


def _cuts(layout: Layout) -> tuple[int, ...]:
    return layout.pp, layout.vpp, layout.tp, layout.cp, layout.etp, layout.ep


def device_of(job: JobSpec) -> Hardware:
    """The profile of the job's devices."""
    return hardware(job.cluster.hardware, job.cluster.devices_per_node)


def price(job: JobSpec, device: Hardware, run_by: Software | None = None) -> Plan:
    """What a job costs whose degrees and options are all given; `run_by` as for estimate_time."""
    workload = Workload.of(job, Layout.of(job.layout), job.layout.micro_batch or 1)
    memory, time = estimate_memory(workload, device), estimate_time(workload, device, run_by)
    return _plan(job, workload, memory, time, device)


def _plan(job: JobSpec, workload: Workload, memory: MemoryEstimate, time: TimeEstimate, device: Hardware) -> Plan:
    layout, micro_batch = workload.layout, workload.micro_batch
    factor = spread(workload.software)
    tokens_per_second = job.train.global_batch * job.train.sequence_length / time.total
    peak = device.peak_flops(job.train.precision)
    flops = job.model.flops_per_token(job.train.sequence_length) * tokens_per_second / layout.world
    return Plan(
        layout=layout,
        micro_batch=micro_batch,
        options=job.layout.options | _swapped(workload, device),
        micro_batches=job.train.global_batch // (layout.dp * micro_batch),
        memory=memory,
        p_out_of_memory=memory.p_out_of_memory(device.memory_bytes),
        time=time,
        interval=(time.total / factor, time.total * factor),
        tokens_per_second=tokens_per_second,
        mfu=flops / peak if peak else None,
    )


def _swapped(workload: Workload, device: Hardware) -> dict[str, Any]:
    if workload.swapping is None:
        return {}
    swapping = settled(workload, device).swapping
    return {"offload_activations": swapping and swapping.share}


def step_of(job: JobSpec, plan: Plan) -> Workload:
    """The job's step as planned."""
    return Workload.of(resolve(job, plan), plan.layout, plan.micro_batch)


def resolve(job: JobSpec, plan: Plan) -> JobSpec:
    """The job with every degree, the micro-batch and the options filled in, `offload_activations` as a number."""
    degrees = {axis: plan.layout.degree(axis) for axis in DEGREES}
    chosen = {**degrees, **plan.options, "micro_batch": plan.micro_batch}
    return job.model_copy(update={"layout": job.layout.model_copy(update=chosen)})
