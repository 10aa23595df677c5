"""A job made small enough for a laptop, with every divisibility that its layout leans on: what `fivefold exact` trains.

The rule. The layout is kept up to eight ranks; above that, degrees become divisors of what they were, so that as many
axes as possible stay above 1 (expert replicas too; for four attention axes, up to sixteen ranks), then as many degrees
as possible stay what they were, then the world is as large as it may be. A size of the model becomes the smallest
multiple of all that divided it and must divide it still, from a floor on: four layers, the first of them dense where
the model begins so; heads in the same proportion; more experts than a token chooses. Options of the layout are kept;
those that no CPU runs fall back to their defaults. The result is fp32 on CPUs, and trains twenty steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import Any

from jobs.architecture import ModelArchitecture, Spec
from jobs.errors import InputError
from jobs.spec import DEGREES, ClusterSpec, DataSpec, JobSpec, LayoutSpec, TrainSpec
from parallel.capabilities import why_refused
from parallel.layout import Layout, divisors

RANKS, RANKS_OF_FOUR_AXES = 8, 16
STEPS = 20

_GPU_ONLY: dict[str, object] = {
    "dispatcher": "alltoall",
    "offload_optimizer": "none",
    "offload_parameters": "none",
    "nvme_folder": None,
}
"""Options that may need a GPU or a library beside it, and what they fall back to."""


@dataclass(frozen=True)
class Change:
    """A value of the job that the small one has otherwise; both as they are written."""

    path: str
    before: object
    after: object


@dataclass(frozen=True)
class Shrunk:
    job: JobSpec
    changes: tuple[Change, ...]
    """Of the model, the layout and the batch, in the order of the spec. What is trained with (fp32, steps, rates) is
    the same for every job, and not told here."""


def shrink(job: JobSpec) -> Shrunk:
    """The small job for a resolved one. InputError where no small layout of its kind runs: why the first does not."""
    first_reason = None
    for fallbacks in _fallbacks(job.layout):
        for layout in _smaller_layouts(Layout.of(job.layout)):
            small = _small(job, layout, fallbacks)
            reason = why_refused(small)
            if reason is None:
                return Shrunk(small, tuple(_changes(job, small)))
            first_reason = first_reason or reason
    rule = f"no small layout of this kind runs on CPUs: {first_reason}"
    raise InputError("layout", Layout.of(job.layout).label, rule)


def _fallbacks(layout: LayoutSpec) -> Iterator[dict[str, object]]:
    """None of the options given up, then each alone, then more of them."""
    given = [name for name, default in _GPU_ONLY.items() if getattr(layout, name) != default]
    for number in range(len(given) + 1):
        for dropped in itertools.combinations(given, number):
            yield {name: _GPU_ONLY[name] for name in dropped}


def _smaller_layouts(layout: Layout) -> list[Layout]:
    """Those of few enough ranks whose degrees divide those of `layout`, the best first."""
    found = []
    for degrees in itertools.product(*(divisors(layout.degree(axis)) for axis in DEGREES)):
        given: dict[str, Any] = dict(zip(DEGREES, degrees, strict=True))
        try:
            small = Layout(**given)
        except InputError:
            continue
        if small.world > (RANKS_OF_FOUR_AXES if min(small.tp, small.cp, small.dp, small.pp) > 1 else RANKS):
            continue
        kept_above_one = sum(small.degree(axis) > 1 for axis in (*DEGREES, "edp") if layout.degree(axis) > 1)
        kept = sum(small.degree(axis) == layout.degree(axis) for axis in DEGREES)
        found.append(((kept_above_one, kept, small.world, degrees), small))
    return [small for _, small in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _small(job: JobSpec, layout: Layout, fallbacks: dict[str, object]) -> JobSpec:
    degrees = {axis: layout.degree(axis) for axis in DEGREES}
    before = Layout.of(job.layout)
    train, micro_batch = _batch(job, layout)
    model = _model(job.model, before, layout)
    changed = {**degrees, **fallbacks, "micro_batch": micro_batch}
    changed["stage_layers"] = _stage_layers(before, layout.pp, model.layers)
    spec = job.layout.model_copy(update=changed)
    return JobSpec(
        name=job.name,
        engine=job.engine,
        model=model,
        data=DataSpec(files=("random",), packing=job.data.packing),
        cluster=ClusterSpec(name="laptop", device="cpu", hardware="laptop_cpu", devices_per_node=layout.world),
        layout=spec,
        train=train,
        checkpoint=job.checkpoint,
        policy=job.policy,
    )


def _stage_layers(before: Layout, stages: int, layers: int) -> tuple[int, ...] | None:
    """Unequal where they were, by a layer that the largest of the stages takes from the smallest."""
    if before.stage_layers is None or stages == 1:
        return None
    kept, each = before.stage_layers[:stages], [layers // stages] * stages
    each[0] += layers % stages
    if max(kept) > min(kept) and each[kept.index(min(kept))] > 1:
        each[kept.index(min(kept))] -= 1
        each[kept.index(max(kept))] += 1
    return tuple(each)


def _multiple(size: int, floor: int, *divided_by: tuple[int, int]) -> int:
    """The smallest multiple, from `floor` on, of every `after` whose `before` divided `size`; at most `size`."""
    unit = lcm(*(after for before, after in divided_by if size % before == 0))
    return min(size, -(-floor // unit) * unit)


def _model(model: ModelArchitecture, before: Layout, after: Layout) -> ModelArchitecture:
    tp, etp, ep = ((before.degree(axis), after.degree(axis)) for axis in ("tp", "etp", "ep"))
    heads_cut = before.tp * before.cp, after.tp * after.cp
    kv_heads = _multiple(model.kv_heads, min(2, model.kv_heads), tp, heads_cut)
    top_k = min(2, model.top_k)
    changed: dict[str, Any] = {
        "layers": _multiple(model.layers, 4, (before.pp * before.vpp, after.pp * after.vpp)),
        "hidden": min(32, model.hidden),
        "heads": model.heads // model.kv_heads * kv_heads,
        "kv_heads": kv_heads,
        "head_dim": min(4, model.head_dim),
        "ffn": _multiple(model.ffn, 32, tp) if model.dense_layers else 0,
        "vocab": _multiple(model.vocab, 64, tp),
        "init_std": 0.1,  # in so narrow a model, what gives attention and routers opinions
        "first_dense_layers": min(1, model.first_dense_layers),
        "experts": _multiple(model.experts, 2 * top_k, ep),
        "top_k": top_k,
        "expert_ffn": _multiple(model.expert_ffn, 16, etp, tp),
        "shared_expert_ffn": _multiple(model.shared_expert_ffn, 16, tp),
    }
    return model.model_copy(update=changed)


def _batch(job: JobSpec, layout: Layout) -> tuple[TrainSpec, int]:
    """Two micro-batches or more a step where there were, in whole rounds of the pipeline where they were."""
    train, before = job.train, Layout.of(job.layout)
    assert job.layout.micro_batch is not None, "the job is resolved"
    micro_batch = min(2, job.layout.micro_batch)
    count = train.global_batch // (before.dp * job.layout.micro_batch)
    count = _multiple(count, min(count, 2 * layout.pp if layout.pp > 1 else 2), (before.pp, layout.pp))
    plane = before.tp * before.cp, layout.tp * layout.cp
    changed = {
        "steps": STEPS,
        "sequence_length": _multiple(train.sequence_length, 16, plane, (2 * plane[0], 2 * plane[1])),
        "global_batch": layout.dp * micro_batch * count,
        "precision": "fp32",
        # Moves weights by a third of what they began with, and no step by so much that rounding grows into chaos.
        "learning_rate": 3e-3,
        "min_learning_rate": 3e-4,
        "warmup_steps": 3,
        "adam_epsilon": 1e-6,  # above the rounding of gradients, whose sign an update would otherwise be
        "eval_batches": 0,
    }
    return train.model_copy(update=changed), micro_batch


def _changes(before: JobSpec, after: JobSpec) -> Iterator[Change]:
    batch = {"sequence_length", "global_batch"}
    yield from _differences("model", before.model, after.model, set(ModelArchitecture.model_fields) - {"init_std"})
    yield from _differences("layout", before.layout, after.layout, set(LayoutSpec.model_fields))
    yield from _differences("train", before.train, after.train, batch)


def _differences(path: str, before: Spec, after: Spec, fields: set[str]) -> Iterator[Change]:
    for name in type(before).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if name in fields and old != new:
            yield Change(f"{path}.{name}", old, new)
