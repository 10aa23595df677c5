"""What a rank computes of a micro-batch: under context parallelism, its chunks of each sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.reference import positions_of
from orchestrator.worker.engines.protocol import Batch
from parallel.context import zigzag
from parallel.layout import Layout


@dataclass(frozen=True)
class LocalBatch:
    """This rank's zigzag chunks of a micro-batch, [micro_batch, sequence / cp], on its device."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    """Within each token's document; [1, sequence / cp] where all rows agree."""
    documents: Tensor | None
    """[micro_batch, sequence], on the CPU: attention cuts its blocks by them before it launches anything."""


def local_batch(batch: Batch, layout: Layout, rank: int, device: torch.device) -> LocalBatch:
    """The part of `batch`, which is the same on all ranks of one dp coordinate, that `rank` computes."""
    places = zigzag(batch.tokens.shape[1], layout.cp, layout.coordinates(rank)["cp"]) if layout.cp > 1 else slice(None)
    documents = None if batch.documents is None else torch.tensor(batch.documents)
    positions = positions_of(torch.tensor(batch.tokens), documents)
    if documents is None:
        positions = positions[:1]

    def put(array: np.ndarray) -> Tensor:
        return torch.tensor(array[:, places], device=device)

    return LocalBatch(
        put(batch.tokens), put(batch.labels), put(batch.loss_mask), positions[:, places].to(device), documents
    )
