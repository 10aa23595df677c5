"""From a job to the layouts that run it, fastest first, and an account of those that do not. Pure arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import log2, prod
from typing import Any

from jobs.errors import InputError
from jobs.spec import DEGREES, JobSpec
from parallel.capabilities import ATTENTION_RULES, EXPERT_RULES, batch_refusal, check_job, refusal
from parallel.estimates.costs import TimeEstimate, estimate_time
from parallel.estimates.hardware import GIB, Hardware, hardware
from parallel.estimates.memory import LIKELY_OUT, MemoryEstimate, estimate_memory
from parallel.estimates.software import Software, spread
from parallel.estimates.workload import Workload
from parallel.layout import ATTENTION_AXES, Layout, divisors

FEWEST_CONTEXT_TOKENS = 4096
"""Of a sequence that a rank is given where cp is not fixed: with fewer, exchanging keys costs more than it divides."""


@dataclass(frozen=True)
class Plan:
    """A layout that runs, with its fastest micro-batch that fits."""

    layout: Layout
    micro_batch: int
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

    def as_dict(self) -> dict[str, Any]:
        """For plan.json: names with units, parts beside their totals."""
        return {
            "layout": self.layout.as_dict(),
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
class Rejection:
    """A class of layouts that do not run: how many, and one of them with the numbers (of memory, the nearest miss)."""

    key: str
    count: int
    example: str
    axis: str | None
    """The degree that is to blame, a field of LayoutSpec; None for memory, which they all share."""


@dataclass(frozen=True)
class Planning:
    """`plans` fastest first. `considered` counts layouts; a refused attention mesh counts once."""

    plans: tuple[Plan, ...]
    rejections: tuple[Rejection, ...]
    considered: int


def plan_job(job: JobSpec, device: Hardware | None = None) -> Planning:
    """Every layout of the job on its cluster that the engine runs and memory holds; fixed degrees are kept.

    The product of tp, cp, dp and pp is the number of the cluster's devices, or less where the job fixes all four.
    `device` is a profile to plan with in place of the cluster's own. InputError where nothing is left: why, class by
    class, and the nearest choice that runs.
    """
    check_job(job)
    search = _Search(job, device or device_of(job))
    plans = []
    for layout, fits in search.fitting():
        priced = [price(job, layout, micro_batch, memory, search.device) for micro_batch, memory in fits.items()]
        plans.append(min(priced, key=lambda plan: (plan.time.total, plan.micro_batch)))
    rejections = tuple(sorted(search.rejections.values(), key=lambda rejection: -rejection.count))
    if not plans:
        raise _nothing_runs(search, rejections)
    # Of equals, the layout that cuts the model least.
    plans.sort(key=lambda plan: (plan.time.total, plan.layout.pp, plan.layout.tp, plan.layout.etp, plan.layout.ep))
    return Planning(tuple(plans), rejections, len(plans) + sum(rejection.count for rejection in rejections))


def device_of(job: JobSpec) -> Hardware:
    """The profile of the job's devices."""
    return hardware(job.cluster.hardware, job.cluster.devices_per_node)


def price(
    job: JobSpec,
    layout: Layout,
    micro_batch: int,
    memory: MemoryEstimate,
    device: Hardware,
    run_by: Software | None = None,
) -> Plan:
    """A layout and micro-batch, whose memory is known, with what they cost; `run_by` as for estimate_time."""
    workload = Workload.of(job, layout, micro_batch)
    time = estimate_time(workload, device, run_by)
    factor = spread(workload.software)
    tokens_per_second = job.train.global_batch * job.train.sequence_length / time.total
    peak = device.peak_flops(job.train.precision)
    flops = job.model.flops_per_token(job.train.sequence_length) * tokens_per_second / layout.world
    return Plan(
        layout=layout,
        micro_batch=micro_batch,
        micro_batches=job.train.global_batch // (layout.dp * micro_batch),
        memory=memory,
        p_out_of_memory=memory.p_out_of_memory(device.memory_bytes),
        time=time,
        interval=(time.total / factor, time.total * factor),
        tokens_per_second=tokens_per_second,
        mfu=flops / peak if peak else None,
    )


def resolve(job: JobSpec, plan: Plan) -> JobSpec:
    """The job with every degree and the micro-batch filled in."""
    degrees = {axis: plan.layout.degree(axis) for axis in DEGREES}
    return job.model_copy(update={"layout": job.layout.model_copy(update={**degrees, "micro_batch": plan.micro_batch})})


class _Search:
    """One enumeration of a job's layouts; `rejections` is whole once `fitting` is exhausted."""

    def __init__(self, job: JobSpec, device: Hardware) -> None:
        self.job, self.device = job, device
        self.rejections: dict[str, Rejection] = {}
        self.nearest_miss: MemoryEstimate | None = None

    def fitting(self) -> Iterator[tuple[Layout, dict[int, MemoryEstimate]]]:
        """Layouts that run, each with the micro-batches that fit."""
        for mesh in self._attention_meshes():
            for layout in self._folded(mesh):
                fits = self._micro_batches(layout)
                if fits:
                    yield layout, fits

    def _reject(self, key: str, axis: str | None, reason: str) -> None:
        known = self.rejections.get(key) or Rejection(key, 0, reason, axis)
        self.rejections[key] = replace(known, count=known.count + 1)

    def _attention_meshes(self) -> Iterator[Layout]:
        fixed, devices = self.job.layout, self.job.cluster.devices
        given = {axis: degree for axis in ATTENTION_AXES if (degree := getattr(fixed, axis)) is not None}
        product = prod(given.values())
        shown = f"{'*'.join(given)}={'*'.join(map(str, given.values()))}" + (f"={product}" if len(given) > 1 else "")
        if product > devices:
            largest = max(given, key=lambda axis: given[axis])
            self._reject("devices", largest, f"{shown} exceeds the cluster's {devices} devices")
            return
        if len(given) < len(ATTENTION_AXES) and devices % product:
            odd = next((axis for axis in given if devices % given[axis]), next(iter(given)))
            self._reject("devices", odd, f"{shown} does not divide the cluster's {devices} devices")
            return
        world = product if len(given) == len(ATTENTION_AXES) else devices
        choices = {axis: (given[axis],) if axis in given else divisors(world) for axis in ATTENTION_AXES}
        if "cp" not in given:
            longest = max(1, self.job.train.sequence_length // FEWEST_CONTEXT_TOKENS)
            choices["cp"] = tuple(degree for degree in choices["cp"] if degree <= longest)
        for tp, cp, pp in itertools.product(choices["tp"], choices["cp"], choices["pp"]):
            dp, rest = divmod(world, tp * cp * pp)
            if rest or dp not in choices["dp"]:
                continue
            try:
                mesh = Layout(tp=tp, cp=cp, dp=dp, pp=pp, vpp=fixed.vpp or 1)
            except InputError as error:
                self._reject("virtual stages", "vpp", error.rule)
                continue
            refused = refusal(ATTENTION_RULES, mesh, self.job)
            if refused:
                self._reject(refused[0].key, refused[0].axis, refused[1])
            else:
                yield mesh

    def _folded(self, mesh: Layout) -> Iterator[Layout]:
        """The expert meshes over an attention mesh."""
        fixed, plane = self.job.layout, mesh.tp * mesh.cp * mesh.dp
        for etp in (fixed.etp,) if fixed.etp else self._left(plane, fixed.ep or 1):
            for ep in (fixed.ep,) if fixed.ep else self._left(plane, etp):
                try:
                    layout = replace(mesh, ep=ep, etp=etp)
                except InputError as error:
                    self._reject("expert mesh", "ep" if fixed.ep else "etp", error.rule)
                    continue
                refused = refusal(EXPERT_RULES, layout, self.job)
                if refused:
                    self._reject(refused[0].key, refused[0].axis, refused[1])
                else:
                    yield layout

    def _left(self, plane: int, taken: int) -> tuple[int, ...]:
        """Degrees that one axis of the expert mesh may have beside another of `taken`."""
        return divisors(plane // taken) if self.job.model.is_moe and plane % taken == 0 else (1,)

    def _micro_batches(self, layout: Layout) -> dict[int, MemoryEstimate]:
        batch, fixed = self.job.train.global_batch, self.job.layout.micro_batch
        share = batch // layout.dp
        if fixed and share % fixed:
            reason = f"micro_batch={fixed} does not divide global_batch/dp={batch}/{layout.dp}={share}"
            self._reject("micro_batch", "micro_batch", reason)
            return {}
        choices = (fixed,) if fixed else tuple(2**power for power in range((share & -share).bit_length()))
        limit = self.device.memory_bytes
        refusals = {micro_batch: batch_refusal(layout, self.job, share // micro_batch) for micro_batch in choices}
        refused = refusals[choices[0]]
        if refused and all(refusals.values()):
            self._reject(refused[0].key, refused[0].axis, refused[1])
            return {}
        fits: dict[int, MemoryEstimate] = {}
        for micro_batch in (each for each in choices if not refusals[each]):
            memory = estimate_memory(Workload.of(self.job, layout, micro_batch), self.device)
            if memory.p_out_of_memory(limit) > LIKELY_OUT:
                break
            fits[micro_batch] = memory
        if not fits:
            reason = (
                f"{layout.label} with micro_batch={micro_batch} needs {memory.total / GIB:.1f} GiB a device, "
                f"which has {limit / GIB:.1f} GiB"
            )
            self._reject("memory", None, reason)
            if self.nearest_miss is None or memory.total < self.nearest_miss.total:
                self.nearest_miss = memory
                self.rejections["memory"] = replace(self.rejections["memory"], example=reason)
        return fits


def _nothing_runs(search: _Search, rejections: tuple[Rejection, ...]) -> InputError:
    job = search.job
    nearest = _nearest_layouts(search)
    changed = {axis for change in nearest for axis in change}
    # What blames a degree to be changed is said first.
    ordered = sorted(rejections, key=lambda rejection: rejection.axis not in (*changed, None))
    if len(ordered) == 1:
        why = ordered[0].example
    else:
        classes = "; ".join(f"{rejection.example} ({rejection.key}: {rejection.count})" for rejection in ordered)
        why = f"no layout on {job.cluster.devices} devices runs: {classes}"
    if search.nearest_miss is not None:
        why += f"; of that {_largest_parts(search.nearest_miss)}"
    if changed:
        blamed = next((rejection.axis for rejection in ordered if rejection.axis in nearest[0]), None)
        axis = blamed or next(iter(nearest[0]))
        shown = [" ".join(f"{name}={degree}" for name, degree in change.items()) for change in nearest]
        return InputError(f"layout.{axis}", getattr(job.layout, axis), why, " or ".join(shown))
    cluster = _nearest_cluster(search)
    if cluster is None:
        return InputError("cluster", job.cluster.name, why)
    field, value = cluster
    return InputError(f"cluster.{field}", getattr(job.cluster, field), why, f"{field}={value}")


def _largest_parts(memory: MemoryEstimate) -> str:
    """The three that hold most."""
    parts = sorted(asdict(memory).items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in parts)


def _nearest_layouts(search: _Search) -> list[dict[str, int]]:
    """Changes to the fewest of the job's fixed degrees, by the smallest factors, with which it runs; [] if none help.

    At most three, nearest first.
    """
    job = search.job
    fixed = {axis: degree for axis in (*DEGREES, "micro_batch") if (degree := getattr(job.layout, axis)) is not None}
    for number in range(1, len(fixed) + 1):
        found: dict[tuple[tuple[str, int], ...], float] = {}
        # Of equally near choices the one that leaves the first degrees (tp before etp) as they are.
        for freed in itertools.combinations(reversed(fixed), number):
            relaxed = job.layout.model_copy(update=dict.fromkeys(freed))
            freer = _Search(job.model_copy(update={"layout": relaxed}), search.device)
            for layout, fits in freer.fitting():
                for micro_batch in fits:
                    degrees = {**layout.as_dict(), "micro_batch": micro_batch}
                    change = tuple((axis, int(degrees[axis])) for axis in fixed if axis in freed)
                    found[change] = sum(abs(log2(degree / fixed[axis])) for axis, degree in change)
        if found:
            return [dict(change) for change in sorted(found, key=lambda change: found[change])[:3]]
    return []


def _nearest_cluster(search: _Search) -> tuple[str, int] | None:
    """Field of ClusterSpec to change and its nearest value that runs: more nodes for memory, else fewer devices.

    More nodes are 2, 3, 4, 6, 8, 12, ... 64 times as many.
    """
    cluster = search.job.cluster
    if search.nearest_miss is not None:
        factors = sorted({2**power for power in range(1, 7)} | {3 * 2**power for power in range(5)})
        choices = [("nodes", cluster.nodes * factor) for factor in factors]
    else:
        choices = [("nodes", nodes) for nodes in range(cluster.nodes - 1, 0, -1)]
        choices += [("devices_per_node", devices) for devices in range(cluster.devices_per_node - 1, 0, -1)]
    for field, value in choices:
        resized = search.job.model_copy(update={"cluster": cluster.model_copy(update={field: value})})
        if next(_Search(resized, search.device).fitting(), None):
            return field, value
    return None
