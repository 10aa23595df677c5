"""What pipeline stages hold: layers, parameters, micro-batches in flight."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import NamedTuple

from jobs.architecture import ModelArchitecture
from parallel.estimates.workload import Workload, kept_by
from parallel.layout import Layout


class Stage(NamedTuple):
    """What a pipeline stage holds: numbers of layers, and one rank's parameters, by where they are reduced."""

    dense_layers: int
    moe_layers: int
    is_last: bool
    dense_parameters: int
    """Reduced over DP x CP."""
    expert_parameters: int
    """Reduced over EDP."""


def stages(model: ModelArchitecture, layout: Layout) -> tuple[Stage, ...]:
    """The pipeline's stages, first to last; with virtual stages, which are dealt out in turn.

    Layers that are left over go one each to the virtual stages after the first, which has the embedding.
    """
    tp, pp, ep, etp = layout.tp, layout.pp, layout.ep, layout.etp
    parts = pp * layout.vpp
    per_chunk, over = divmod(model.layers, parts)
    starts = [per_chunk * part + min(over, max(0, part - 1)) for part in range(parts + 1)]
    starts[-1] = model.layers
    if layout.stage_layers is not None:
        starts = [0, *itertools.accumulate(layout.stage_layers)]
    every_layer = model.attention_split_parameters // tp + model.attention_replicated_parameters + model.norm_parameters
    dense_ffn = model.ffn_parameters // tp
    gate = model.hidden * model.shared_expert_gate
    moe_ffn = model.router_parameters + (model.shared_expert_parameters - gate) // tp + gate
    experts = model.experts // ep * model.expert_parameters // etp
    table = model.embedding_parameters // tp
    found = []
    for index in range(pp):
        is_first, is_last = index == 0, index == pp - 1
        held = [(starts[part], starts[part + 1]) for part in range(index, parts, pp)]
        per_stage = sum(end - start for start, end in held)
        dense = sum(max(0, min(end, model.dense_layers) - start) for start, end in held)
        moe = per_stage - dense
        # The head is a table of its own; tied, the last stage still needs its copy unless it is the first as well.
        tables = is_first + (is_last and not (is_first and model.tied_embeddings))
        found.append(
            Stage(
                dense_layers=dense,
                moe_layers=moe,
                is_last=is_last,
                dense_parameters=per_stage * every_layer
                + dense * dense_ffn
                + moe * moe_ffn
                + tables * table
                + is_last * model.hidden,
                expert_parameters=moe * experts,
            )
        )
    return tuple(found)


class Kind(NamedTuple):
    """Stages of equal shape."""

    stage: Stage
    first: int
    """Number of the first of them, from 0."""
    number: int


@kept_by("model", *(f"layout.{degree}" for degree in ("tp", "pp", "vpp", "ep", "etp", "stage_layers")))
def kinds(workload: Workload) -> tuple[Kind, ...]:
    every = stages(workload.model, workload.layout)
    return tuple(Kind(stage, every.index(stage), number) for stage, number in Counter(every).items())


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of all its layers (Narayanan et al. 2021)."""
    if layout.vpp == 1:
        return min(micro_batches, layout.pp - stage)
    chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(micro_batches * layout.vpp, chunks) / layout.vpp
