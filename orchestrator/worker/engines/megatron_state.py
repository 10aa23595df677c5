"""Weights and Adam's moments of Megatron's distributed optimizer by parameter, whole and in fp32."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from orchestrator.worker.engines.protocol import Kept


class State:
    """`read` and `write` are collective over the ranks that share a parameter's state: DP, or EDP for an expert's."""

    def __init__(self, optimizer: ChainedOptimizer) -> None:
        self._optimizers: list[DistributedOptimizer] = optimizer.chained_optimizers

    def held(self, kept: Kept, parameter: Parameter) -> Tensor:
        """The optimizer's own, of a parameter that one rank holds whole."""
        part = self._part(self._of(parameter), kept, parameter)
        assert part is not None
        return part.view(parameter.shape)

    def read(self, parameter: Parameter, kept: Kept) -> Tensor:
        """A copy, of the parameter's shape."""
        optimizer = self._of(parameter)
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        part = self._part(optimizer, kept, parameter)
        if part is not None:
            self._run(optimizer, whole, parameter).copy_(part)
        dist.all_reduce(whole, group=optimizer.data_parallel_group)
        return whole.view(parameter.shape)

    @torch.no_grad()
    def write(self, parameter: Parameter, kept: Kept, value: Tensor) -> None:
        """Set from a tensor of the parameter's shape, equal on all ranks; of a weight, the model's copy too."""
        optimizer = self._of(parameter)
        value = value.to(parameter.device)
        part = self._part(optimizer, kept, parameter)
        if part is not None:
            part.copy_(self._run(optimizer, value.flatten(), parameter))
        if kept == "weight":
            parameter.copy_(value)

    def _of(self, parameter: Parameter) -> DistributedOptimizer:
        for optimizer in self._optimizers:
            if any(parameter in buffer.param_index_map for buffer in optimizer.buffers):
                return optimizer
        raise ValueError("a parameter that no optimizer steps")

    def _part(self, optimizer: DistributedOptimizer, kept: Kept, parameter: Parameter) -> Tensor | None:
        """Of this rank's shard, flat; None where nothing of the parameter is in it."""
        if parameter not in optimizer.model_param_group_index_map:
            return None
        tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        part: Tensor = tensors["param" if kept == "weight" else kept]
        return part

    def _run(self, optimizer: DistributedOptimizer, whole: Tensor, parameter: Parameter) -> Tensor:
        """Of a flat tensor, what is in this rank's shard."""
        run = optimizer._get_model_param_range_map(parameter)["param"]
        return whole[run.start : run.end]
