"""Weights and Adam's moments of a DeepSpeed engine by parameter, whole and in fp32, whichever ZeRO stage keeps them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor
from torch.nn import Parameter

from orchestrator.worker.engines.protocol import MOMENTS, Kept


class State:
    """All methods are collective over the ranks that share a parameter's state: DP, or EDP for an expert's."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, adam: torch.optim.AdamW) -> None:
        self._engine, self._adam = engine, adam
        self._stage: int = engine.zero_optimization_stage()

    def read(self, parameter: Parameter, kept: Kept) -> Tensor:
        """A copy, of the whole parameter's shape."""
        key = None if kept == "weight" else kept
        if self._stage == 0:
            return (parameter if key is None else self._adam.state[parameter][key]).detach().clone()
        if self._stage == 3:
            return self._engine.optimizer.get_full_hp_param(parameter, key)
        return parameter.get_full_hp_param(key)

    @torch.no_grad()
    def write(self, parameter: Parameter, kept: Kept, value: Tensor) -> None:
        """Set from a tensor of the whole parameter's shape, equal on all ranks; of a weight, the model's copy too."""
        key = None if kept == "weight" else kept
        value = value.to(parameter.device, torch.float32)
        if self._stage == 0:
            (parameter if key is None else self._adam.state[parameter][key]).copy_(value)
        elif self._stage == 3:
            self._write_partition(parameter, key, value)
        else:
            parameter.set_full_hp_param(value, key)
            if key is None:
                parameter.copy_(value)

    def _write_partition(self, parameter: Parameter, key: str | None, value: Tensor) -> None:
        optimizer = self._engine.optimizer
        length = parameter.ds_tensor.ds_numel
        start = length * optimizer._get_param_partition_rank(parameter)
        partition = value.flatten()[start : start + length]
        # The last of the partitions may reach beyond the parameter.
        partition = torch.nn.functional.pad(partition, (0, length - len(partition)))
        # DeepSpeed's set_local_hp_param takes a parameter that lies on NVMe for an empty one.
        held, index = optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        held.copy_(partition)
        if optimizer._swappable_optimizer_subgroup(index):
            optimizer._optimizer_states_and_gradient_swap_out(index)
        if key is None:
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(value)

    @property
    def steps(self) -> int:
        """Steps that Adam has counted."""
        return int(next(iter(self._adam.state.values()))["step"])

    def renew(self, steps: int = 0) -> None:
        """Moments of zero, there from the start: memory peaks in the first step, and step 0 can be saved."""
        for index, held in enumerate(self._held()):
            with self._in_memory(index):
                state = self._adam.state[held]
                state["step"] = torch.full((), float(steps), device=held.device)
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(held) if moment not in state else state[moment].zero_()
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @contextlib.contextmanager
    def _in_memory(self, index: int) -> Iterator[None]:
        """Read what is offloaded to NVMe, and write it back; what is too small for it stays in memory."""
        optimizer = self._engine.optimizer
        if self._stage < 3 or not optimizer._swappable_optimizer_subgroup(index):
            yield
            return
        optimizer._optimizer_states_and_gradient_swap_in(index)
        yield
        optimizer._optimizer_states_and_gradient_swap_out(index)

    def _held(self) -> list[Tensor]:
        """What Adam steps: the parameters, or this rank's flat parts of them."""
        optimizer: Any = self._engine.optimizer
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
            if hasattr(optimizer, name):
                return list(getattr(optimizer, name))
        return [parameter for group in self._adam.param_groups for parameter in group["params"]]
