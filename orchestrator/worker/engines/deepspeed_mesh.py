"""A layout's groups, under the names by which DeepSpeed asks for them."""

from __future__ import annotations

import torch.distributed as dist

from parallel.layout import Layout
from parallel.process_groups import new_group


class Mesh:
    """This rank's groups. DeepSpeed takes it for its `mpu` where it has not made groups of its own, for a pipeline.

    Ranks of cp see different tokens of one batch, as those of dp do, and are data parallel ranks to DeepSpeed: it
    averages gradients and shards ZeRO's state over both.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.at = layout.coordinates(dist.get_rank())
        self.tensor = new_group(layout, "tp")
        self.sequence = new_group(layout, "cp")
        self.data = new_group(layout, "cp", "dp")
        self.model = new_group(layout, "tp", "pp")
        self.losses = new_group(layout, "cp", "dp", "pp")
        """Ranks whose sum is that of all losses, where only a last stage has any."""

    def get_tensor_model_parallel_rank(self) -> int:
        return self.at["tp"]

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.layout.tp

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.model)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data
