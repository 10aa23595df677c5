"""What a plan may choose beside degrees: options that change a job's time and memory, and nothing that is learnt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.errors import InputError
from jobs.spec import SIMPLEST, JobSpec, LayoutSpec, RecomputedModule
from parallel.capabilities import check_job

_PARTS_OF_EXPERTS = frozenset({"moe", "shared_experts"})
_WHOLE_LAYER = frozenset({"layernorm", "core_attn", "mlp"}) | _PARTS_OF_EXPERTS


def variants(job: JobSpec) -> tuple[JobSpec, ...]:
    """The job with its open options filled in each way that its engine may run, the simplest first.

    Of equally simple ones what recomputes less is first. Where recomputation is open, attention is not recomputed
    alone: the kernels that engines run keep no scores, so that it would be all work and no memory.
    InputError where the engine runs none, whatever the layout.
    """
    check_job(job)
    found = []
    for chosen in _choices(job):
        candidate = job.model_copy(update={"layout": job.layout.model_copy(update=chosen)})
        try:
            check_job(candidate)
        except InputError:
            continue
        found.append(candidate)
    if not found:  # each option would do by itself, not all of those that are fixed
        check_job(job.model_copy(update={"layout": job.layout.model_copy(update=job.layout.options)}))
    return tuple(found)


def recomputed(layout: LayoutSpec) -> frozenset[str]:
    """All that backward computes again, so that of two sets the smaller costs less time wherever both fit."""
    modules = frozenset[str](layout.options["recompute_modules"])
    if layout.recompute == "full":
        return _WHOLE_LAYER
    if layout.recompute != "selective":
        return frozenset()
    return modules | _PARTS_OF_EXPERTS if "moe" in modules else modules


def label(options: Mapping[str, Any]) -> str:
    """Those that are not the simplest, for a table: `recompute layernorm mlp, zero_stage 3`."""
    again = recompute_label(options["recompute"], options["recompute_modules"])
    shown = [] if again == "none" else [f"recompute {again}"]
    for name, simplest in SIMPLEST.items():
        if not name.startswith("recompute") and options[name] != simplest:
            shown.append(f"{name} {options[name]}")
    if (share := options.get("offload_activations")) is not None:
        shown.append(f"offload_activations {share:g}")
    return ", ".join(shown)


def without_a_name(layout: LayoutSpec) -> list[str]:
    """What of a layout is this project's own, so that no framework has a flag or a key for it."""
    found = []
    if layout.offload_activations is not None:
        share = f"offload_activations={layout.offload_activations:g}"
        found.append(f"{share}: activations of that share of the tokens in host memory, the others computed again")
    if layout.expert_parallelism == "fssdp":
        found.append("expert_parallelism=fssdp: experts that ranks share")
    return found


def recompute_label(recompute: str, modules: tuple[str, ...]) -> str:
    """`none`, `full`, or the modules."""
    return " ".join(modules) if recompute == "selective" else recompute


def _choices(job: JobSpec) -> Iterator[dict[str, Any]]:
    layout = job.layout
    # A CPU's memory is its device's: nothing leaves it.
    places = ("none", "cpu") if job.cluster.device == "cuda" else ("none",)
    menu: dict[str, tuple[Any, ...]] = {
        "offload_parameters": places,
        "offload_optimizer": places,
        "optimizer_replicas": (1,),
        "zero_stage": (1, 0, 2, 3),
        "expert_parallelism": ("ep", "fssdp") if job.model.is_moe else ("ep",),
    }
    open_or_fixed = [menu[name] if getattr(layout, name) is None else (getattr(layout, name),) for name in menu]
    for values in itertools.product(*open_or_fixed):
        for recompute in _recomputations(job):
            yield dict(zip(menu, values, strict=True)) | recompute


def _recomputations(job: JobSpec) -> Iterator[dict[str, Any]]:
    """From none to all; what is fixed of it is kept."""
    layout = job.layout
    kinds = ("none", "selective", "full") if layout.recompute is None else (layout.recompute,)
    for kind in kinds:
        sets: list[tuple[RecomputedModule, ...]] = [()]
        if kind == "selective":
            sets = [layout.recompute_modules] if layout.recompute_modules is not None else list(_sets(job))
        elif layout.recompute_modules is not None:
            sets = [layout.recompute_modules]
        for modules in sets:
            yield {"recompute": kind, "recompute_modules": modules}


def _sets(job: JobSpec) -> Iterator[tuple[RecomputedModule, ...]]:
    """Sets of modules that the model has, smaller ones first; `moe` is all of an MoE layer's feed-forward part."""
    model = job.model
    present: list[RecomputedModule] = ["layernorm"]
    if model.dense_layers:
        present.append("mlp")
    if model.is_moe:
        present += [*(("shared_experts",) if model.shared_expert_ffn else ()), "moe"]
    for number in range(1, len(present) + 1):
        for modules in itertools.combinations(present, number):
            if "moe" not in modules or not _PARTS_OF_EXPERTS & set(modules) - {"moe"}:
                yield modules
