"""Weights by their global names: how a rank's part lies in a whole tensor, and what a new model begins with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.architecture import ModelArchitecture
from jobs.tensors import Shape


@dataclass(frozen=True)
class Shard:
    """A block of one of `jobs.tensors`, as a rank holds it. Two names may share an engine's tensor, never elements."""

    name: str
    shape: Shape
    """Of the whole tensor."""
    offset: Shape
    """Of the block's first element."""
    size: Shape
    """Of the block."""
    part: Tensor
    """The engine's own memory: a view with the block's elements in the block's order, of any shape."""

    def read(self) -> Tensor:
        """A copy of the block, of shape `size`."""
        return self.part.detach().reshape(self.size).clone()

    @torch.no_grad()
    def write(self, block: Tensor) -> None:
        """Set the block, converted to the engine's precision."""
        self.part.copy_(block.reshape(self.part.shape))

    def cut(self, whole: Tensor) -> Tensor:
        """This block of a tensor of shape `shape`."""
        return whole[tuple(slice(at, at + length) for at, length in zip(self.offset, self.size, strict=True))]


Source = Callable[[Shard], Tensor]
"""Gives a shard's block, of shape `size`, in any precision and on any device."""


def whole(name: str, tensor: Tensor) -> Shard:
    """All of a tensor."""
    shape = tuple(tensor.shape)
    return Shard(name, shape, (0,) * len(shape), shape, tensor)


def fill(shards: Iterable[Shard], source: Source) -> None:
    """Set every shard from what `source` gives."""
    for shard in shards:
        shard.write(source(shard))


def drawn(model: ModelArchitecture, seed: int) -> Source:
    """What a run of `seed` begins with.

    Each whole tensor is drawn by a generator seeded with its name and then cut, so a weight is the same at every layout
    and in every engine (for one kind of device).
    """
    return lambda shard: shard.cut(draw(shard.name, shard.shape, model, seed, shard.part.device))


def draw(name: str, shape: Shape, model: ModelArchitecture, seed: int, device: torch.device) -> Tensor:
    """A new tensor, fp32: norms 1, biases 0, matrices normal with mean 0.

    Standard deviation `init_std`, over sqrt(2 * layers) for what writes to the residual stream (GPT-2, Radford et al.
    2019).
    """
    if name.endswith(".bias"):
        return torch.zeros(shape, device=device)
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    writes_residual = name.endswith((".output.weight", ".down.weight"))
    std = model.init_std / math.sqrt(2 * model.layers) if writes_residual else model.init_std
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big"))
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)
