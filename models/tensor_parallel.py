"""Tensor parallelism for the reference model (Shoeybi et al. 2019), applied from outside.

Heads, feed-forward widths, experts' too, and the vocabulary are divided; a block's input and output are replicated,
and each block costs one all-reduce of [batch, sequence, hidden] forward and one backward. DeepSpeed's own layers for
this (module_inject/layers.py, 0.19.8) are not used: where a gradient is not contiguous they reduce a copy and go on
with the unreduced one, and the layout is a global state there, not a group that a layer is given.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from jobs.tensors import Shape
from models.reference import Layer, MoE, RMSNorm, Routing, SwiGLU
from models.weights import Shard
from parallel.sums import sum_gradients, sum_parts

_ROWS = (".query.weight", ".key.weight", ".value.weight", ".query.bias", ".key.bias", ".value.bias")
_ROWS += (".gate.weight", ".up.weight")
_COLUMNS = (".output.weight", ".down.weight")
_STACKED = (".mlp.gate_up", ".mlp.down")
"""Experts of a layer, [experts, ...]."""


def split_dim(name: str) -> int | None:
    """Along which of its dimensions a tensor of `jobs.tensors`, or several in one, are divided; None: not at all."""
    if name.endswith(_STACKED):
        return 2
    if name in ("embedding.weight", "head.weight") or name.endswith(_ROWS):
        return 0
    return 1 if name.endswith(_COLUMNS) else None


def block(name: str, part: Tensor, size: Shape, index: int, degree: int) -> Shard:
    """`part`, the memory of a tensor that `split_tensors` left with `size`, as rank `index` of `degree` holds it."""
    dim = split_dim(name)
    shape = tuple(length * degree if at == dim else length for at, length in enumerate(size))
    offset = tuple(length * index if at == dim else 0 for at, length in enumerate(size))
    return Shard(name, shape, offset, size, part)


def split_tensors(decoder: nn.Module, group: dist.ProcessGroup) -> None:
    """Leave `decoder`, a Decoder or a stage of one, with this rank's part of each tensor and make it compute as whole.

    It may be without memory yet. Its logits are then [batch, sequence, vocab / tp], and for
    `vocabulary_cross_entropy`. What divides what it holds (heads, widths, the vocabulary) is the caller's to check.
    """
    index, degree = dist.get_rank(group), dist.get_world_size(group)
    for name, parameter in decoder.named_parameters():
        dim = split_dim(name)
        if dim is not None:
            parameter.data = parameter.data.chunk(degree, dim)[index].contiguous()
    for name, module in list(decoder.named_modules()):
        match module:
            case Layer():
                # Behind the norm, not before attention, whose parts may be computed apart (deepspeed_swap.py).
                module.attention_norm.register_forward_hook(lambda norm, inputs, normed: sum_gradients(normed, group))
                module.attention.output.register_forward_hook(lambda linear, inputs, part: sum_parts(part, group))
                for norm in (module.attention.query_norm, module.attention.key_norm):
                    if isinstance(norm, RMSNorm):
                        norm.forward = _OfEveryHead(norm, group)
            case MoE():
                _divide(module.experts, module.experts, group)
                if module.shared is not None:
                    _divide(module.shared, module.shared, group)
            case SwiGLU() if name.endswith(".ffn"):
                _divide(module, module, group)
            case nn.Embedding():
                module.forward = _RowsHere(module, index, group)
    if getattr(decoder, "norm", None) is not None:
        decoder.norm.register_forward_hook(lambda norm, inputs, normed: sum_gradients(normed, group))


def vocabulary_cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """-log softmax(logits)[label] of each token, fp32: logits [batch, sequence, vocab / tp], labels [batch, sequence].

    Forward: three all-reduces of [batch, sequence]. Backward: nothing; each rank finds the gradient of its logits.
    """
    from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy

    start, held = dist.get_rank(group) * logits.shape[-1], logits.shape[-1]
    losses: Tensor = vocab_parallel_cross_entropy(
        logits,
        labels,
        tp_group=group,
        vocab_start_index=start,
        vocab_end_index=start + held,
        global_vocab_size=held * dist.get_world_size(group),
        reduction="none",
    )
    return losses


def _divide(first: nn.Module, last: nn.Module, group: dist.ProcessGroup) -> None:
    """Ranks work on parts from the input of `first` to the output of `last`, which is made whole."""

    def enter(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(_entered(value, group) for value in inputs)

    first.register_forward_pre_hook(enter)
    last.register_forward_hook(lambda module, inputs, part: sum_parts(part, group))


def _entered(value: object, group: dist.ProcessGroup) -> object:
    if isinstance(value, Routing):
        # A part of an expert's output tells a part of how much its weight matters.
        return replace(value, weights=sum_gradients(value.weights, group))
    return sum_gradients(value, group) if isinstance(value, Tensor) else value


class _OfEveryHead:
    """A norm whose weight all heads share: each rank knows of its own heads' gradients only."""

    def __init__(self, norm: RMSNorm, group: dist.ProcessGroup) -> None:
        self._norm, self._group = norm, group

    def __call__(self, x: Tensor) -> Tensor:
        weight = sum_gradients(self._norm.weight, self._group)
        return functional.rms_norm(x, weight.shape, weight, self._norm.epsilon)


class _RowsHere:
    """A look-up in a divided table: tokens that other ranks hold come from them."""

    def __init__(self, embedding: nn.Embedding, index: int, group: dist.ProcessGroup) -> None:
        self._embedding, self._index, self._group = embedding, index, group

    def __call__(self, tokens: Tensor) -> Tensor:
        table = self._embedding.weight
        row = tokens - self._index * len(table)
        here = (row >= 0) & (row < len(table))
        found = functional.embedding(torch.where(here, row, 0), table) * here[..., None]
        return sum_parts(found, self._group)
