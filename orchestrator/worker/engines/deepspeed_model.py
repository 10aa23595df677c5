"""What DeepSpeed trains: a rank's part of the reference model with its loss, as a layout divides them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from jobs.architecture import ModelArchitecture
from kernels.cross_entropy import linear_cross_entropy
from models.reference import Context
from models.stages import Stage
from models.tensor_parallel import vocabulary_cross_entropy
from models.ulysses import part_of_context, part_of_rows
from orchestrator.worker.engines.deepspeed_mesh import Mesh
from orchestrator.worker.engines.protocol import Batch


@dataclass(frozen=True)
class MicroBatch:
    """A Batch on the device, as this rank sees it: its part of every row, but whole documents for attention's mask."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    context: Context

    @classmethod
    def of(cls, batch: Batch, mesh: Mesh, device: torch.device) -> MicroBatch:
        arrays = (batch.tokens, batch.labels, batch.loss_mask)
        tokens, labels, mask = (torch.tensor(array, device=device) for array in arrays)
        documents = None if batch.documents is None else torch.tensor(batch.documents, device=device)
        context = part_of_context(tokens, documents, mesh.sequence)
        tokens, labels, mask = (part_of_rows(rows, mesh.sequence).contiguous() for rows in (tokens, labels, mask))
        return cls(tokens, labels, mask, context)


def total_cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor, mesh: Mesh) -> Tensor:
    """Sum over counted labels, fp32 []; logits are of this rank's part of the vocabulary."""
    if mesh.layout.tp > 1:
        losses = vocabulary_cross_entropy(logits, labels, mesh.tensor)
    else:
        flat = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        losses = flat.view_as(labels)
    return (losses * mask).sum()


class WholeModel(Stage):
    """The only stage and its loss, in one: DeepSpeed prepares backward by the tensors that its module gives."""

    def __init__(self, model: ModelArchitecture, mesh: Mesh) -> None:
        super().__init__(model, range(model.layers))
        self._mesh = mesh

    def forward(self, batch: MicroBatch, scale: Tensor, auxiliary_weight: float) -> tuple[Tensor, Tensor]:
        """`scale` * sum of cross-entropies, [], and the sum, fp64 []; its backward has the auxiliary losses' too."""
        self.contexts, self.auxiliary_weight = iter((batch.context,)), auxiliary_weight
        if self._mesh.layout.tp > 1:
            total = total_cross_entropy(super().forward(batch.tokens), batch.labels, batch.mask, self._mesh)
        else:
            hidden = self.run(batch.tokens).flatten(0, 1)
            total = linear_cross_entropy(hidden, self.head_weight, batch.labels.flatten(), batch.mask.flatten())
        return total * scale, total.detach().double()
