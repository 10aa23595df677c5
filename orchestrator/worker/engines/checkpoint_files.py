"""The format of both engines' checkpoints, which any layout reads, whatever layout wrote them. None executes."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint

from models.uncompiled import uncompiled
from orchestrator.files import FileEntry, Files, Hook, unhindered
from orchestrator.worker.checkpoint_tensors import PlainValues, Reader, Writer

# Said by torch of what Megatron calls of it.
warnings.filterwarnings("ignore", "Please use DTensor instead and we are deprecating", FutureWarning)

with uncompiled():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreLoadPlanner,
        MCoreSavePlanner,
        TorchDistLoadShardedStrategy,
        _replace_sharded_keys_with_state_dict_keys,
        _replace_state_dict_keys_with_sharded_keys,
        _restore_dict_types,
        _unwrap_pyt_sharded_tensor,
        mcore_to_pyt_state_dict,
    )


class _Planner(PlainValues, MCoreLoadPlanner):
    """Megatron's, which holds the shapes against the model's."""


class _ReadSafely(TorchDistLoadShardedStrategy):
    """As its base, but by torch's own reader and a planner that run nothing of what they read."""

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> dict[str, Any]:
        by_key, nesting, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        wanted = mcore_to_pyt_state_dict(by_key, True)
        tensors = [each for each in nested_values(sharded_state_dict) if isinstance(each, ShardedTensor)]
        planner = _Planner(shapes_validation_sharded_tensors=tensors)
        torch_checkpoint.load(wanted, storage_reader=Reader(checkpoint_dir), planner=planner)
        found = {key: _unwrap_pyt_sharded_tensor(value) for key, value in wanted.items()}
        state = _replace_sharded_keys_with_state_dict_keys(found, nesting, renamed)
        _restore_dict_types(state, sharded_state_dict)
        return state


class _ReadCommon(TorchCommonLoadStrategy):
    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return torch.load(Path(checkpoint_dir) / COMMON_STATE_FNAME, map_location="cpu", weights_only=True)


def write_files(state: ShardedStateDict, folder: Path, before: Hook = unhindered) -> list[FileEntry]:
    """Collective. Write every rank's part of a state into the existing `folder`, on a disk that all ranks share.

    Returns the files that this rank wrote. What fails on one rank, as a disk that is full, raises on all.
    """
    # Ranks are compared in what all should hold alike. A stage without experts has an empty optimizer for them,
    # which Megatron would report as a difference.
    sharded, common = save_preprocess(state, preprocess_common_before_consistancy_check=lambda common: {})
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    content = io.BytesIO()
    torch.save(common, content)
    config = json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode()
    files = Files(folder, before)
    torch_checkpoint.save(
        mcore_to_pyt_state_dict(by_key, False),
        storage_writer=Writer(files, {COMMON_STATE_FNAME: content.getvalue(), CONFIG_FNAME: config}),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    return list(files.written.values())


def read_files(state: ShardedStateDict, folder: Path, *, whole: bool = True) -> dict[str, Any]:
    """Collective. What `write_files` wrote, in the form of `state`, which every rank gives its part of.

    whole: whether the parts of all ranks must cover each tensor once. InputError where the folder does not tell what is
    in it. Whatever its files hold, none of it is executed.
    """
    return dist_checkpointing.load(state, str(folder), _ReadSafely(), _ReadCommon(), whole)


def stored_names(folder: Path) -> set[str]:
    """Of the tensors that `write_files` wrote."""
    return set(Reader(folder).read_metadata().state_dict_metadata)
