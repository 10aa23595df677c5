"""When each pipeline stage computes what in a step: 1F1B, and interleaved over virtual stages.

Narayanan et al. 2021, as Megatron-Core schedules it: a rank warms up with as many forward passes as keep those after it
busy, then alternates, then drains. Stages are taken to be equally long, and messages between them to cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Box:
    """One micro-batch's pass through one virtual stage; seconds from the step's start."""

    stage: int
    chunk: int
    """Virtual stage of that stage, 0 to vpp - 1."""
    kind: Kind
    micro_batch: int
    start: float
    end: float


def timeline(stages: int, chunks: int, micro_batches: int, forward: float, backward: float) -> list[Box]:
    """Boxes of a step. `forward` and `backward`: seconds that a micro-batch takes in one chunk of a stage.

    With several chunks, micro_batches is a multiple of stages, as Megatron-Core demands. The last box ends after
    (micro_batches * chunks + stages - 1) * (forward + backward).
    """
    orders = [_order(stage, stages, chunks, micro_batches) for stage in range(stages)]
    done: dict[tuple[Kind, int, int], float] = {}
    """End of a pass, by its kind, micro-batch and place among all stages * chunks virtual stages."""
    free, at = [0.0] * stages, [0] * stages
    boxes: list[Box] = []
    last = stages * chunks - 1
    while len(boxes) < sum(map(len, orders)):
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                kind, micro_batch, chunk = order[at[stage]]
                place = chunk * stages + stage
                if kind == "forward":
                    ready = done.get((kind, micro_batch, place - 1)) if place else 0.0
                elif place == last:
                    ready = done.get(("forward", micro_batch, place))
                else:
                    ready = done.get((kind, micro_batch, place + 1))
                if ready is None:
                    break
                start = max(free[stage], ready)
                free[stage] = done[kind, micro_batch, place] = start + (forward if kind == "forward" else backward)
                boxes.append(Box(stage, chunk, kind, micro_batch, start, free[stage]))
                at[stage] += 1
    return boxes


def _order(stage: int, stages: int, chunks: int, micro_batches: int) -> list[tuple[Kind, int, int]]:
    """What a stage does, in turn: (kind, micro-batch, chunk)."""
    passes = micro_batches * chunks
    behind = stages - stage - 1
    warm_up = min(passes, behind if chunks == 1 else 2 * behind + (chunks - 1) * stages)
    found: list[tuple[Kind, int, int]] = [_forward(index, stages, chunks) for index in range(warm_up)]
    for index in range(passes):
        if warm_up + index < passes:
            found.append(_forward(warm_up + index, stages, chunks))
        _, micro_batch, chunk = _forward(index, stages, chunks)
        found.append(("backward", micro_batch, chunks - 1 - chunk))
    return found


def _forward(index: int, stages: int, chunks: int) -> tuple[Kind, int, int]:
    """A stage's forward pass number `index`: groups of `stages` micro-batches go through each chunk in turn."""
    if chunks == 1:
        return "forward", index, 0
    group, within = divmod(index, stages * chunks)
    chunk, member = divmod(within, stages)
    return "forward", group * stages + member, chunk
