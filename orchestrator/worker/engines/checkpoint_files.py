"""The format of both engines' checkpoints: Megatron-Core's torch_dist, in which any layout reads what any wrote."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch.distributed.checkpoint as torch_checkpoint

from models.uncompiled import uncompiled

# Said by torch of what Megatron calls of it.
for _message in (
    "`load_state_dict` is deprecated and will be removed",
    "Please use DTensor instead and we are deprecating",
):
    warnings.filterwarnings("ignore", _message, FutureWarning)

with uncompiled():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        TorchDistSaveShardedStrategy,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )


class _WriteInProcess(TorchDistSaveShardedStrategy):
    """The torch_dist format, written by torch's own writer.

    Megatron's starts a manager and two writer processes a rank, made for saving behind the back of training.
    """

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def write_files(state: ShardedStateDict, folder: Path) -> None:
    """Collective. Write every rank's part of a state into the existing `folder`, on a disk that all ranks share."""
    dist_checkpointing.save(
        state,
        str(folder),
        _WriteInProcess("torch_dist", 1),
        # Ranks are compared in what all should hold alike. A stage without experts has an empty optimizer for them,
        # which Megatron would report as a difference.
        preprocess_common_before_consistancy_check=lambda common: {},
    )
