"""A DeepSpeed engine's weights and optimizer state on disk: whole tensors of the model, whatever the layout.

DeepSpeed's own checkpoints are of one layout, to be converted for others. These have a tensor each for every weight and
moment, in fp32 and under the names of `jobs.tensors`, so that any number of ranks reads them at any ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.nn import Parameter

from jobs.tensors import Shape
from models.deepspeed_experts import Index
from models.weights import Shard, Source
from orchestrator.files import FileEntry, Hook
from orchestrator.worker.engines.checkpoint_files import read_files, write_files
from orchestrator.worker.engines.deepspeed_state import State
from orchestrator.worker.engines.protocol import KEPT, Kept

_READ_AT_ONCE = 1 << 28
"""Elements of parameters that a rank reads before it sets them: with their moments, 3 GiB."""


@dataclass(frozen=True)
class Held:
    """A parameter, and where in it which blocks of the model's tensors are; the blocks' `part` is not looked at."""

    parameter: Parameter
    shape: Shape
    """Of the whole parameter, which ZeRO-3 leaves it without."""
    blocks: Sequence[tuple[Index, Shard]]

    def joined(self, source: Source) -> Tensor:
        """What `source` gives of each block, as the parameter has it, in fp32."""
        whole = torch.empty(self.shape, device=self.parameter.device)
        for index, block in self.blocks:
            whole[index] = source(block).to(whole)
        return whole


def save(state: State, held: Sequence[Held], buffers: Sequence[Shard], folder: Path, before: Hook) -> list[FileEntry]:
    """Collective. A block that several ranks hold is written by one of them, in turn, so that all write a share."""
    mine = _written_here([block for entry in held for _, block in entry.blocks] + list(buffers))
    found: dict[str, ShardedTensor | int] = {"steps": state.steps}
    for entry in held:
        for kept in KEPT:
            value = state.read(entry.parameter, kept)
            for index, block in entry.blocks:
                if _place(block) in mine:
                    found[_key(kept, block)] = _sharded(kept, block, value[index].cpu())
    for block in buffers:
        if _place(block) in mine:
            found[_key("weight", block)] = _sharded("weight", block, block.read().cpu())
    return write_files(found, folder, before)


def load(state: State, held: Sequence[Held], buffers: Sequence[Shard], folder: Path) -> None:
    """Collective. Restore what `save` wrote."""
    wanted = {_key("weight", block): _sharded("weight", block, block.read().cpu()) for block in buffers}
    read = read_files({"steps": 0, **wanted}, folder, whole=False)
    for block in buffers:
        block.write(read[_key("weight", block)])
    state.renew(read["steps"])
    for entries in _batches(held):
        wanted = {
            _key(kept, block): _sharded(kept, block, torch.empty(block.size))
            for entry in entries
            for _, block in entry.blocks
            for kept in KEPT
        }
        read = read_files(wanted, folder, whole=False)
        for entry in entries:
            for kept in KEPT:
                state.write(entry.parameter, kept, entry.joined(partial(_of, read, kept)))


def _written_here(blocks: list[Shard]) -> set[tuple[str, tuple[int, ...]]]:
    """Places of the blocks that this rank writes, of those that it holds."""
    everywhere: list[list[tuple[str, tuple[int, ...]]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [_place(block) for block in blocks])
    holders: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank, places in enumerate(everywhere):
        for place in places or ():
            holders.setdefault(place, []).append(rank)
    rank = dist.get_rank()
    return {place for turn, (place, ranks) in enumerate(sorted(holders.items())) if ranks[turn % len(ranks)] == rank}


def _of(read: dict[str, Tensor], kept: Kept, block: Shard) -> Tensor:
    return read[_key(kept, block)]


def _batches(held: Sequence[Held]) -> Iterator[Sequence[Held]]:
    """As many on every rank, since reading is collective."""
    elements = sum(torch.Size(entry.shape).numel() for entry in held)
    count = torch.tensor(-(-elements // _READ_AT_ONCE))
    dist.all_reduce(count, dist.ReduceOp.MAX)
    for index in range(int(count)):
        yield held[index :: int(count)]


def _place(block: Shard) -> tuple[str, tuple[int, ...]]:
    return block.name, block.offset


def _key(kept: Kept, block: Shard) -> str:
    return f"{kept}.{block.name}"


def _sharded(kept: Kept, block: Shard, value: Tensor) -> ShardedTensor:
    cuts = [
        (axis, offset // size, whole // size)
        for axis, (offset, size, whole) in enumerate(zip(block.offset, block.size, block.shape, strict=True))
        if size != whole
    ]
    return ShardedTensor.from_rank_offsets(_key(kept, block), value, *cuts)
