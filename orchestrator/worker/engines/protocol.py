"""What the training loop asks of an engine. Everything else (data, schedule, reports, manifests) is the loop's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from models.weights import Shard, Source
from orchestrator.files import FileEntry, Hook, unhindered
from parallel.offload import Figures

Kept = Literal["weight", "exp_avg", "exp_avg_sq"]
"""What is kept of a parameter: the weight that the optimizer steps, in fp32, and Adam's two moments."""

MOMENTS: tuple[Kept, ...] = ("exp_avg", "exp_avg_sq")
KEPT: tuple[Kept, ...] = ("weight", *MOMENTS)

StateSource = Callable[[Kept, Shard], Tensor]
"""Gives a shard's block of what is kept, of shape `size`, in fp32."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: int64 arrays of shape [micro_batch, sequence_length]; labels are tokens shifted by one."""

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    """float32, 1 where a label counts."""
    documents: np.ndarray | None = None
    """int64, ascending along a row: which of the row's documents a token is of. It attends to its own only, and its
    position counts from its document's first token in the row. None: each row is one document."""


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: global figures, the same on every rank, and what this rank's experts were given."""

    loss: float
    """Mean cross-entropy over the step's counted labels, nats, without auxiliary losses."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    routed_rows: int | None = None
    """That this rank's experts computed in forward, what backward computes again counted again; None: no experts."""
    expert_loads: dict[int, list[int]] | None = None
    """By layer of a stage, from 0, the tokens of each expert over all ranks: of a step that is recorded, from one rank
    of the stage."""
    swapped: Figures | None = None
    """What swapping this rank's activations came to; None: they stay."""


class Engine(Protocol):
    """One rank's part of a model in training. Every method is collective: all ranks call it in the same order.

    Built by `build(job, layout, device)` of its module after `torch.distributed` is initialised.
    """

    parameters: int
    """Parameters of the whole model, over all ranks."""

    before_update: Callable[[], None]
    """Called in `train_step` when gradients are there and before any state changes; nothing unless it is set."""

    def train_step(self, step: int, learning_rate: float, batches: Sequence[Batch]) -> StepResult:
        """Forward and backward over this rank's micro-batches, clip, and one optimizer step.

        Random numbers are drawn from (seed, step) alone, so that a resumed run draws what an undisturbed one would.
        """

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean cross-entropy over all ranks' batches, nats; leaves the training state as it was."""

    def set_weights(self, source: Source) -> None:
        """Begin from other weights: every block of this rank is set to what `source` gives; optimizer state is new."""

    def weights(self) -> Iterator[Shard]:
        """Copies of this rank's blocks of `jobs.tensors`, in fp32 where the engine keeps that.

        Over all ranks they cover every tensor; replicas hold the same blocks.
        """

    def adopt(self, source: StateSource, steps: int) -> None:
        """Go on from the state that any engine had after `steps`. Of one rank alone, which holds everything."""

    def state(self) -> Sequence[Tensor] | None:
        """All that a step changes on this rank, by reference, in an order that follows from the job and the layout.

        None where an engine does not have it all in memory, or not as tensors that stay.
        """

    def restored(self, step: int) -> None:
        """What `state` gave has been overwritten, by what it was after `step`."""

    def save(self, folder: Path, before: Hook = unhindered) -> list[FileEntry]:
        """Write weights and optimizer state, resharding-ready, under `folder` (on a disk that all ranks share).

        Returns the files that this rank wrote, hashed as they were written. What fails on one rank raises on all.
        """

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, at this engine's layout, whatever layout wrote it."""
