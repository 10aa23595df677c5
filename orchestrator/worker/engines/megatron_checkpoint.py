"""Weights and optimizer state of a Megatron model, written and read so that every layout reads what any wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from orchestrator.files import FileEntry, Hook
from orchestrator.worker.engines.checkpoint_files import read_files, stored_names, write_files

# Of Megatron's formats for the distributed optimizer, the one that is laid out like the model and so can be read at
# other degrees of every axis: fp32 weights and Adam's moments are gathered over DP and written as whole shards.
_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

SHARING = (".experts.chosen", ".experts.history")
"""Ends of names of what `models.sparse_experts` keeps beside weights."""


def count_padding(chunk: DistributedDataParallel) -> None:
    """Have the optimizer's gather keep the padding between gradient buckets; call before the optimizer is made.

    Megatron 0.16.1 leaves the padding out when it gathers and then cuts parameters out by indices that count it, so
    every bucket but the first is saved shifted. A tied embedding in a pipeline always has a bucket of its own.
    """
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def save_sharded(
    models: list[torch.nn.Module], optimizer: MegatronOptimizer, folder: Path, before: Hook
) -> list[FileEntry]:
    """Collective. Write into the existing `folder`, on a disk that all ranks share. Returns this rank's files."""
    return write_files(_state(models, optimizer, is_loading=False), folder, before)


def load_sharded(models: list[torch.nn.Module], optimizer: MegatronOptimizer, folder: Path) -> None:
    """Collective. Restore what `save_sharded` wrote. What only a run with shared experts keeps may not be there."""
    wanted = _state(models, optimizer, is_loading=True)
    known = stored_names(folder)
    own = {}
    for name, _ in _named(models):
        weights = wanted["model"][name]
        absent = [key for key, entry in weights.items() if key.endswith(SHARING) and entry.key not in known]
        own[name] = {key: weights.pop(key).data for key in absent}
    state = read_files(wanted, folder)
    for name, model in _named(models):
        model.load_state_dict(state["model"][name] | own[name])
    optimizer.load_state_dict(state["optimizer"])


def _state(models: list[torch.nn.Module], optimizer: MegatronOptimizer, *, is_loading: bool) -> ShardedStateDict:
    weights = {name: model.sharded_state_dict() for name, model in _named(models)}
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_FORMAT),
    }


def _named(models: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    """This rank's virtual stages. The files do not know of them: tensors are named by layers of the whole model."""
    return ((f"stage{index}", model) for index, model in enumerate(models))
