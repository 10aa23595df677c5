"""Every layout of a job on its cluster that the engine runs and memory holds, and an account of the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from jobs.errors import InputError
from jobs.spec import JobSpec
from parallel.capabilities import ATTENTION_RULES, EXPERT_RULES, batch_refusal, refusal
from parallel.estimates.hardware import GIB, Hardware
from parallel.estimates.memory import MemoryEstimate, estimate_memory, is_too_much
from parallel.estimates.swapping import settled, share_of
from parallel.estimates.workload import Workload
from parallel.layout import ATTENTION_AXES, Layout, divisors
from parallel.planning.options import label, recomputed, variants
from parallel.rules import Rule

SMALLER_SHARES = (0.5, 0.25, 0.0)
"""Of tokens, that are swapped where as many as the link carries do not fit."""


@dataclass(frozen=True)
class Rejection:
    """A class of layouts that do not run: how many, and one of them with the numbers (of memory, the nearest miss)."""

    key: str
    count: int
    example: str
    axis: str | None
    """The degree that is to blame, a field of LayoutSpec; None for memory, which they all share."""


class Fit(NamedTuple):
    """A way to run a layout that memory holds."""

    job: JobSpec
    """With its options filled in, its degrees as they were."""
    workload: Workload


class _Variant(NamedTuple):
    job: JobSpec
    workload: Workload
    """At any layout."""
    again: frozenset[str]
    """What it recomputes."""
    others: tuple[Any, ...]
    """Its options but for that."""

    def only_slower_than(self, other: _Variant) -> bool:
        # Where activations are swapped, what is computed again does not wait for the link.
        return self.workload.swapping is None and self.others == other.others and self.again > other.again


class Search:
    """One enumeration of a job's layouts; `rejections` is whole once `fitting` is exhausted."""

    def __init__(self, job: JobSpec, device: Hardware) -> None:
        self.job, self.device = job, device
        self.rejections: dict[str, Rejection] = {}
        self.nearest_miss: MemoryEstimate | None = None
        self.candidates = 0
        """Layouts with a micro-batch and all options that the engine runs."""
        self.evaluations = 0
        """Candidates whose memory was estimated, and those that fit, whose time is."""
        self._variants = [_variant(each) for each in variants(job)]

    def fitting(self) -> Iterator[tuple[Layout, list[Fit]]]:
        """Layouts that run, each with the ways that fit and of which one is its fastest."""
        for mesh, rulings in self._attention_meshes():
            for layout, runnable in self._folded(mesh, rulings):
                for staged in self._interleaved(layout):
                    fits = self._fits(staged, runnable)
                    if fits:
                        yield staged, fits

    def _reject(self, key: str, axis: str | None, reason: str) -> None:
        known = self.rejections.get(key) or Rejection(key, 0, reason, axis)
        self.rejections[key] = replace(known, count=known.count + 1)

    def _ruled(self, rules: tuple[Rule, ...], layout: Layout, asked: list[_Variant]) -> list[_Variant]:
        """Those that no rule refuses at this layout; where none is left, the first one's reason is noted.

        No rule of layouts looks at what is recomputed.
        """
        refusals = {each.others: refusal(rules, layout, each.job) for each in reversed(asked)}
        left = [each for each in asked if refusals[each.others] is None]
        if not left and (refused := refusals[asked[0].others]):
            self._reject(refused[0].key, refused[0].axis, refused[1])
        return left

    def _attention_meshes(self) -> Iterator[tuple[Layout, list[_Variant]]]:
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
        for tp, cp, pp in itertools.product(choices["tp"], choices["cp"], choices["pp"]):
            dp, rest = divmod(world, tp * cp * pp)
            if rest or dp not in choices["dp"]:
                continue
            try:
                mesh = Layout(tp=tp, cp=cp, dp=dp, pp=pp, vpp=fixed.vpp or 1, stage_layers=fixed.stage_layers)
            except InputError as error:
                uneven = error.path == "layout.stage_layers"
                rule = f"stage_layers={list(fixed.stage_layers or ())}: {error.rule}" if uneven else error.rule
                self._reject(*(("stages", "pp") if uneven else ("virtual stages", "vpp")), rule)
                continue
            left = self._ruled(ATTENTION_RULES, mesh, self._variants)
            if left:
                yield mesh, left

    def _folded(self, mesh: Layout, asked: list[_Variant]) -> Iterator[tuple[Layout, list[_Variant]]]:
        """The expert meshes over an attention mesh."""
        fixed, plane = self.job.layout, mesh.tp * mesh.cp * mesh.dp
        for etp in (fixed.etp,) if fixed.etp else self._left(plane, fixed.ep or 1):
            for ep in (fixed.ep,) if fixed.ep else self._left(plane, etp):
                try:
                    layout = replace(mesh, ep=ep, etp=etp)
                except InputError as error:
                    self._reject("expert mesh", "ep" if fixed.ep else "etp", error.rule)
                    continue
                left = self._ruled(EXPERT_RULES, layout, asked)
                if left:
                    yield layout, left

    def _left(self, plane: int, taken: int) -> tuple[int, ...]:
        """Degrees that one axis of the expert mesh may have beside another of `taken`."""
        return divisors(plane // taken) if self.job.model.is_moe and plane % taken == 0 else (1,)

    def _interleaved(self, layout: Layout) -> Iterator[Layout]:
        """The layout with each number of virtual stages that the engine and some micro-batch take."""
        yield layout
        model, share = self.job.model, self.job.train.global_batch // layout.dp
        if self.job.layout.vpp is None and layout.pp > 1 and layout.stage_layers is None and share % layout.pp == 0:
            for vpp in divisors(model.layers // layout.pp)[1:]:
                staged = replace(layout, vpp=vpp)
                if refusal(ATTENTION_RULES, staged, self._variants[0].job) is None:
                    yield staged

    def _fits(self, layout: Layout, runnable: list[_Variant]) -> list[Fit]:
        """Ways to run a layout, but for those that recompute more than another that fits and is else alike."""
        batch, fixed = self.job.train.global_batch, self.job.layout.micro_batch
        share = batch // layout.dp
        if fixed and share % fixed:
            reason = f"micro_batch={fixed} does not divide global_batch/dp={batch}/{layout.dp}={share}"
            self._reject("micro_batch", "micro_batch", reason)
            return []
        choices = (fixed,) if fixed else divisors(share)
        refusals = {micro_batch: batch_refusal(layout, self.job, share // micro_batch) for micro_batch in choices}
        refused = refusals[choices[0]]
        if refused and all(refusals.values()):
            self._reject(refused[0].key, refused[0].axis, refused[1])
            return []
        allowed = [micro_batch for micro_batch in choices if not refusals[micro_batch]]
        self.candidates += len(allowed) * len(runnable)
        fits: list[Fit] = []
        fitting: list[tuple[_Variant, int]] = []
        nearest: Fit | None = None
        for variant in runnable:
            least = max((most for other, most in fitting if variant.only_slower_than(other)), default=0)
            # More sequences at once need more memory: mostly few more fit than without computing more again.
            most = least
            for micro_batch in allowed[least:]:
                step = self._swapped(variant.workload.at(layout, micro_batch))
                if self._too_much(step):
                    if not fits:
                        nearest = min(filter(None, (nearest, Fit(variant.job, step))), key=self._needed)
                    break
                fits.append(Fit(variant.job, step))
                most += 1
            if most > least:
                fitting.append((variant, most))
        self.evaluations += len(fits)
        if nearest and not fits:
            self._miss(layout, nearest)
        return fits

    def _swapped(self, step: Workload) -> Workload:
        """With fewer swapped tokens than the link carries, where that is open and so many do not fit."""
        if step.swapping is None or step.swapping.share != "auto":
            return step
        best = settled(step, self.device)
        if best.swapping is None:  # which is told of what was asked for
            return step
        shares = [share for share in SMALLER_SHARES if share < share_of(best)] if self._too_much(best) else []
        fewer = (replace(best, swapping=replace(best.swapping, share=share)) for share in shares)
        return next((each for each in fewer if not self._too_much(each)), best)

    def _too_much(self, step: Workload) -> bool:
        self.evaluations += 1
        return is_too_much(step, self.device)

    def _needed(self, fit: Fit) -> int:
        return estimate_memory(fit.workload, self.device).total

    def _miss(self, layout: Layout, nearest: Fit) -> None:
        memory, options = estimate_memory(nearest.workload, self.device), label(nearest.job.layout.options)
        reason = (
            f"{layout.label} with micro_batch={nearest.workload.micro_batch}{options and ', '}{options} needs "
            f"{memory.total / GIB:.1f} GiB a device, which has {self.device.memory_bytes / GIB:.1f} GiB"
        )
        self._reject("memory", None, reason)
        if self.nearest_miss is None or memory.total < self.nearest_miss.total:
            self.nearest_miss = memory
            self.rejections["memory"] = replace(self.rejections["memory"], example=reason)


def _variant(job: JobSpec) -> _Variant:
    others = tuple(value for name, value in job.layout.options.items() if not name.startswith("recompute"))
    return _Variant(job, Workload.of(job, Layout(), 1), recomputed(job.layout), others)
