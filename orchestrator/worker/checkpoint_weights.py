"""What is in a checkpoint, a tensor at a time; no process group, no engine."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from jobs.architecture import ModelArchitecture
from models.megatron_shards import whole_shards
from orchestrator.worker.engines.protocol import KEPT, Kept, StateSource

Read = Callable[[str], Tensor]
"""Gives one of `jobs.tensors` by its name, in the precision that it was saved in."""


def read_megatron(folder: Path, model: ModelArchitecture, kept: Kept | None = None) -> Read:
    """Of a checkpoint by engines/megatron_checkpoint.py; `kept`: what the optimizer keeps, in fp32.

    Megatron stacks layers that are alike, and always experts, into one tensor with a dimension for each.
    """
    stored = _Stored(folder)
    block = lru_cache(maxsize=2)(stored.block)  # query, key and value are one tensor there: read once, not thrice
    places = {}
    for prefix in _MEGATRONS[kept]:
        for key, shape in stored.shapes.items():
            if not key.startswith(prefix) or (not prefix and key.startswith("optimizer.")):
                continue
            for at, name in _unstacked(key.removeprefix(prefix), shape):
                for shard in whole_shards(name, torch.empty(shape[len(at) :], device="meta"), model):
                    places[shard.name] = (key, at, name)

    def read(tensor: str) -> Tensor:
        key, at, name = places[tensor]
        return next(shard.read() for shard in whole_shards(name, block(key, at), model) if shard.name == tensor)

    return read


def read_deepspeed(folder: Path, model: ModelArchitecture, kept: Kept | None = None) -> Read:
    """Of a checkpoint by engines/deepspeed_checkpoint.py, which has each of `jobs.tensors` whole, and in fp32."""
    stored = _Stored(folder)
    return lambda tensor: stored.block(f"{kept or 'weight'}.{tensor}", ())


_MEGATRONS: dict[Kept | None, tuple[str, ...]] = {
    None: ("",),
    "weight": ("", "optimizer.state.param."),  # router biases are weights that no optimizer steps
    "exp_avg": ("optimizer.state.exp_avg.",),
    "exp_avg_sq": ("optimizer.state.exp_avg_sq.",),
}
"""Of keys; what is under a later prefix counts before what is under one before it."""

READERS = {"megatron": read_megatron, "deepspeed": read_deepspeed}
"""By the engine that wrote the checkpoint."""


def state_in(folder: Path, engine: str, model: ModelArchitecture) -> StateSource:
    """All of a checkpoint that `engine` wrote, for an engine to adopt."""
    read = {kept: READERS[engine](folder, model, kept) for kept in KEPT}
    return lambda kept, shard: shard.cut(read[kept](shard.name)).float()


def _unstacked(key: str, shape: torch.Size) -> Iterator[tuple[tuple[int, ...], str]]:
    """Where a key's tensors lie in it, and their names as `whole_shards` takes them."""
    if not key.startswith("decoder.layers."):
        yield (), key
        return
    name = key.removeprefix("decoder.")
    first = name.split(".")[1]
    layers = [((), name)] if first.isdigit() else [((i,), f"layers.{i}.{name[7:]}") for i in range(shape[0])]
    for at, layer in layers:
        if ".experts.experts." not in layer:
            yield at, layer
            continue
        for expert in range(shape[len(at)]):
            yield (*at, expert), layer.replace(".experts.experts.", f".experts.local_experts.{expert}.")


class _Stored:
    """A folder in the format of torch.distributed.checkpoint: each tensor in chunks, each chunk a saved tensor."""

    def __init__(self, folder: Path) -> None:
        metadata = FileSystemReader(folder).read_metadata()
        self._folder, self._places = folder, metadata.storage_data
        tensors = metadata.state_dict_metadata.items()
        self._entries = {key: entry for key, entry in tensors if isinstance(entry, TensorStorageMetadata)}
        self.shapes = {key: entry.size for key, entry in self._entries.items()}

    def block(self, key: str, at: tuple[int, ...]) -> Tensor:
        """The tensor [rest] at indices `at` of the first dimensions of the tensor [..., rest] called `key`."""
        entry, fixed = self._entries[key], len(at)
        found = torch.empty(entry.size[fixed:], dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            inside = [index - offset for index, offset in zip(at, chunk.offsets, strict=False)]
            if all(0 <= index < size for index, size in zip(inside, chunk.sizes, strict=False)):
                target = zip(chunk.offsets[fixed:], chunk.sizes[fixed:], strict=True)
                part = self._chunk(MetadataIndex(key, chunk.offsets))[tuple(inside)]
                found[tuple(slice(offset, offset + size) for offset, size in target)] = part
        return found

    def _chunk(self, index: MetadataIndex) -> Tensor:
        place = self._places[index]
        with (self._folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            saved: Tensor = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        return saved
