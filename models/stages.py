"""Stages of a pipeline over the reference model: runs of its layers, the ends with what is before and after."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.architecture import ModelArchitecture
from models.reference import Context, Layer, RMSNorm


class Stage(nn.Module):
    """A run of `models.reference.Decoder`'s layers; tensors have the names that they have there.

    A tied head is a copy of the embedding, whose gradients are for the caller to add up.
    """

    contexts: Iterator[Context]
    """Of the micro-batches to come, one a forward pass: every stage knows them, and nobody sends them."""
    auxiliary_weight: float
    """What a micro-batch's auxiliary loss counts in the loss."""

    def __init__(self, model: ModelArchitecture, layers: range) -> None:
        """layers: from 0; the first stage has the embedding, the last the norm and the head."""
        super().__init__()
        self.is_first, self.is_last = layers.start == 0, layers.stop == model.layers
        self.has_tied_head = self.is_last and model.tied_embeddings
        if self.is_first or self.has_tied_head:
            self.embedding = nn.Embedding(model.vocab, model.hidden)
        self.layers = nn.ModuleDict({str(layer): Layer(model, layer) for layer in layers})
        if self.is_last:
            self.norm = RMSNorm(model.hidden, model.norm_epsilon)
            self.head = None if model.tied_embeddings else nn.Linear(model.hidden, model.vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """int64 tokens [batch, sequence] in the first stage, else hidden states -> the same, in the last logits."""
        hidden = self.run(x)
        return functional.linear(hidden, self.head_weight) if self.is_last else hidden

    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden], of the last stage."""
        return self.embedding.weight if self.head is None else self.head.weight

    def run(self, x: Tensor) -> Tensor:
        """All but the head, in the last stage with the norm before it."""
        context = next(self.contexts)
        hidden = self.embedding(x) if self.is_first else x
        for layer in self.layers.values():
            hidden, auxiliary = layer(hidden, context)
            hidden = _Attach.apply(hidden, auxiliary, self.auxiliary_weight)
        return self.norm(hidden) if self.is_last else hidden


class _Attach(torch.autograd.Function):
    """Lets a loss that no later stage sees into the backward pass: its gradient comes along with the activations'."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, auxiliary: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(auxiliary)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (auxiliary,) = ctx.saved_tensors
        return gradient, torch.full_like(auxiliary, ctx.weight), None
