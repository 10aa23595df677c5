"""The DeepSpeed engine: the reference model under ZeRO, over gloo on CPUs and over NCCL on GPUs."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from jobs.spec import JobSpec
from models.reference import MoE, Router, Routing
from models.sparse_experts import SparseExperts
from models.sparse_owners import Owned
from models.stages import Stage
from models.weights import Shard, Source, drawn, fill, whole
from orchestrator.files import FileEntry, Hook, unhindered
from orchestrator.nvme import check_nvme
from orchestrator.worker.engines.checkpoint_files import stored_names
from orchestrator.worker.engines.expert_loads import ExpertLoads
from orchestrator.worker.engines.protocol import KEPT, Batch, StateSource, StepResult
from orchestrator.worker.engines.routed_rows import RoutedRows
from orchestrator.worker.engines.shared_experts import SharedExperts, sharing
from orchestrator.worker.engines.state_tensors import each_once, nothing, tensors_of
from parallel.layout import Layout

# isort: split
# Which device DeepSpeed drives is decided when it is imported, for a rank by the devices that it is let see.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # or initialize does, and with it torch's compiler: 3 s in every rank
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import logger, set_z3_leaf_modules

from models.deepspeed_experts import (
    EXPERT_GROUP,
    ExpertMLP,
    Index,
    group_experts,
    mark_experts,
    parts_of,
    shard_experts,
)
from models.deepspeed_fusions import install
from models.deepspeed_swap import swap_layers
from models.tensor_parallel import block, split_dim, split_tensors
from models.ulysses import split_sequence
from orchestrator.worker.engines.deepspeed_checkpoint import Held, load, save
from orchestrator.worker.engines.deepspeed_mesh import Mesh
from orchestrator.worker.engines.deepspeed_model import MicroBatch, WholeModel
from orchestrator.worker.engines.deepspeed_pipeline import Pipeline
from orchestrator.worker.engines.deepspeed_settings import settings
from orchestrator.worker.engines.deepspeed_state import State
from orchestrator.worker.engines.swapping import swapping

# It would run compilers and query GPUs to know what it could compile, and on a CPU then compile an all-reduce.
deepspeed.ops.__compatible_ops__ = {}
logger.setLevel(logging.ERROR)
warnings.filterwarnings("ignore", r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated")


def build(job: JobSpec, layout: Layout, device: torch.device) -> DeepSpeedEngine:
    """Set up this rank's part of `job` at `layout` on `device`.

    Wants torch.distributed initialised with layout.world ranks, gloo for a CPU or NCCL with the device set for a GPU.
    Once a process: DeepSpeed's groups are global. InputError where it is to offload to NVMe and cannot.
    """
    check_nvme(job.layout)
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    deepspeed.init_distributed(dist_init_required=False)
    return DeepSpeedEngine(job, layout, device)


def _tokens_of(experts: int, routing: Routing) -> Tensor:
    return torch.bincount(routing.experts.flatten(), minlength=experts)


class DeepSpeedEngine:
    """Implements `orchestrator.worker.engines.protocol.Engine`. All ranks of a DP coordinate are given equal batches.

    What is optimised is as in the Megatron engine: the mean over the counted labels of the whole global batch, norms
    and biases not decayed, and a balancing loss that does not depend on the layout.
    """

    parameters: int

    def __init__(self, job: JobSpec, layout: Layout, device: torch.device) -> None:
        self._job, self._train, self._layout, self._device = job, job.train, layout, device
        self.before_update: Callable[[], None] = nothing
        self._reseed(0)
        self._mesh = Mesh(layout)
        self._experts, replicas = self._expert_groups() if layout.ep > 1 else (None, None)
        self._decoder = self._build_decoder()
        self._pipeline = Pipeline(self._decoder, self._mesh, tied=job.model.tied_embeddings) if layout.pp > 1 else None
        self._mark()
        modules = list(self._decoder.modules())
        shared = [module.arrivals for module in modules if isinstance(module, SparseExperts)]
        self._rows = RoutedRows(shared or [module for module in modules if isinstance(module, ExpertMLP)])
        routers = {
            int(layer): module.moe.router for layer, module in self._decoder.layers.items() if hasattr(module, "moe")
        }
        self._loads = ExpertLoads(routers, partial(_tokens_of, job.model.experts), self._mesh.data)
        self.parameters = job.model.parameters
        optimizer = torch.optim.AdamW(
            self._parameter_groups(),
            lr=self._train.learning_rate,
            betas=(self._train.adam_beta1, self._train.adam_beta2),
            eps=self._train.adam_epsilon,
            fused=True,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints how much memory there is
            self._engine, *_ = deepspeed.initialize(
                model=self._pipeline or self._decoder,
                optimizer=optimizer,
                config=settings(job, layout, device, self._decoder),
                mpu=None if self._pipeline else self._mesh,
                dist_init_required=False,
            )
        self._adam, self._state = optimizer, State(self._engine, optimizer)
        self._shared = SharedExperts([self._owned], self._experts, replicas, self._state)
        self.set_weights(drawn(job.model, self._train.seed))

    def train_step(self, step: int, learning_rate: float, batches: Sequence[Batch]) -> StepResult:
        self._reseed(step)
        self._engine.train()
        parts, counted = self._put(batches)
        # DeepSpeed averages gradients over DP: a sum of losses times this becomes the mean over the global batch.
        scale = (dist.get_world_size(self._mesh.data) / counted).float()
        self._rows.take()
        self._loads.begin_step(step)
        self._shared.begin_step()
        total = self._forward_backward(parts, scale)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        grad_norm = self._step()
        self._shared.end_step(step)
        self._update_router_biases()
        dist.all_reduce(total, group=self._mesh.losses)
        swapped = self._swap.take_figures() if self._swap else None
        return StepResult((total / counted).item(), grad_norm, self._rows.take(), self._loads.end_step(), swapped)

    def evaluate(self, batches: Sequence[Batch]) -> float:
        self._engine.eval()
        parts, counted = self._put(batches)
        with torch.no_grad():
            total = self._forward(parts)
        dist.all_reduce(total, group=self._mesh.losses)
        return (total / counted).item()

    def set_weights(self, source: Source) -> None:
        with self._shared.as_expert_parallel():
            for held in self._held():
                # In the precision that is trained in: the optimizer's copy begins from what the model sees.
                self._state.write(held.parameter, "weight", held.joined(source).to(held.parameter.dtype))
        fill(self._biases(), source)
        self._state.renew()

    def weights(self) -> Iterator[Shard]:
        with self._shared.as_expert_parallel():
            for held in self._held():
                value = self._state.read(held.parameter, "weight")
                for index, shard in held.blocks:
                    yield replace(shard, part=value[index])
        for bias in self._biases():
            yield replace(bias, part=bias.read())

    def adopt(self, source: StateSource, steps: int) -> None:
        self._state.renew(steps)
        for held in self._held():
            for kept in KEPT:
                self._state.write(held.parameter, kept, held.joined(partial(source, kept)))
        fill(self._biases(), partial(source, "weight"))

    def state(self) -> list[Tensor] | None:
        options = self._job.layout.options
        # ZeRO-3 gathers and drops parameters as they are used, and what is on NVMe is not here.
        if options["zero_stage"] == 3 or options["offload_optimizer"] == "nvme":
            return None
        held = [tensor.data for tensor in (*self._decoder.parameters(), *self._decoder.buffers())]
        return each_once([*held, *tensors_of(self._adam)])

    def restored(self, step: int) -> None:
        self._shared.restored()  # Adam's count of steps is among its tensors

    def save(self, folder: Path, before: Hook = unhindered) -> list[FileEntry]:
        with self._shared.as_expert_parallel():
            return save(self._state, self._held(), [*self._biases(), *self._shared.kept()], folder, before)

    def load(self, folder: Path) -> None:
        self._shared.forget_owners()
        known = stored_names(folder)
        sharing = [shard for shard in self._shared.kept() if f"weight.{shard.name}" in known]
        load(self._state, self._held(), [*self._biases(), *sharing], folder)
        self._shared.go_to_owners()

    def _held(self) -> list[Held]:
        return [self._of(parameter, parts) for parameter, parts in parts_of(self._decoder)]

    def _biases(self) -> list[Shard]:
        return [whole(f"{name}.bias", router.bias) for name, router in self._routers()]

    def _forward_backward(self, batches: Sequence[MicroBatch], scale: Tensor) -> Tensor:
        """Leave averaged gradients. Returns the sum of this rank's cross-entropies, fp64 []."""
        if self._pipeline:
            return self._pipeline.run(self._engine, batches, scale, forward_only=False)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss, cross_entropy = self._engine(batch, scale, 1 / len(batches))
            self._engine.backward(loss)
            total += cross_entropy
        return total

    def _forward(self, batches: Sequence[MicroBatch]) -> Tensor:
        unused = torch.ones((), device=self._device)
        if self._pipeline:
            return self._pipeline.run(self._engine, batches, unused, forward_only=True)
        return torch.stack([self._engine(batch, unused, 0.0)[1] for batch in batches]).sum()

    def _build_decoder(self) -> Stage:
        """Without values yet; weights in the precision that they are trained in, router biases in fp32."""
        job, layout, mesh = self._job, self._layout, self._mesh
        with torch.device("meta"):
            layers = layout.layers_of(mesh.at["pp"], job.model.layers)
            decoder = WholeModel(job.model, mesh) if layout.pp == 1 else Stage(job.model, layers)
        install(decoder)
        shared = sharing(job, layout, self._experts, self._device)
        layers = shard_experts(decoder, self._experts, *shared) if shared else {}
        if not shared:
            group_experts(decoder, self._experts)
        if layout.tp > 1:
            split_tensors(decoder, mesh.tensor)
        if layout.cp > 1:
            split_sequence(decoder, mesh.sequence)
        if self._train.precision == "bf16":
            for parameter in decoder.parameters():
                parameter.data = parameter.data.bfloat16()
        decoder.to_empty(device=self._device)
        for buffer in decoder.buffers():
            buffer.zero_()
        self._owned = Owned(layers) if layers else None
        if self._owned is not None and mesh.at["pp"] == layout.pp - 1:
            self._owned.turn()
        # ZeRO-3 gathers what it calls a leaf at once, whichever experts are visited, and looks for tensors in its
        # output alone, not in what its parts hand one another.
        set_z3_leaf_modules(decoder, [MoE], raise_if_not_found=False)
        self._swap = swapping(job, self._device)
        if self._swap is not None:
            swap_layers(decoder, self._swap)
        elif job.layout.recompute == "full":
            for layer in decoder.layers.values():
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        return decoder

    def _mark(self) -> None:
        """Tell DeepSpeed which parameters are whose, once they are in memory, since a move forgets.

        A part of a tensor counts in the gradient's norm on every rank that has one, a replica on the first. DeepSpeed
        knows what to count by `model_parallel` and `ds_pipe_replicated`; it would take any tensor of the ranks that are
        not first for a replica, another stage's too.
        """
        mark_experts(self._decoder)
        for name, parameter in self._decoder.named_parameters():
            is_copy = name == "embedding.weight" and not self._decoder.is_first
            parameter.ds_pipe_replicated = is_copy
            parameter.model_parallel = not is_copy and (self._mesh.at["tp"] == 0 or split_dim(name) is not None)

    def _expert_groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Tell DeepSpeed of the layout's groups of experts and of their replicas. Gives this rank's of both."""
        made = []
        for axis, groups, ranks in (
            ("ep", deepspeed_groups._EXPERT_PARALLEL_GROUP, deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS),
            ("edp", deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP, deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS),
        ):
            for members in self._layout.groups(axis):
                group = dist.new_group(list(members))
                if dist.get_rank() in members:
                    groups[EXPERT_GROUP], ranks[EXPERT_GROUP] = group, list(members)
                    made.append(group)
        return made[0], made[1]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Of what is decayed and what is not, and of experts apart, which are reduced over fewer ranks."""
        groups: dict[tuple[bool, bool], dict[str, Any]] = {}
        for parameter in self._decoder.parameters():
            is_expert, is_decayed = hasattr(parameter, "group_name"), parameter.dim() > 1
            new: dict[str, Any] = {"params": [], "weight_decay": self._train.weight_decay if is_decayed else 0.0}
            if is_expert:
                new |= {"moe": True, "name": EXPERT_GROUP}
            groups.setdefault((is_expert, is_decayed), new)["params"].append(parameter)
        return list(groups.values())

    def _of(self, parameter: Parameter, parts: Sequence[tuple[Index, str]]) -> Held:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        at, degree = self._mesh.at["tp"], self._layout.tp
        blocks = [(index, block(name, parameter.data, shape[len(index) :], at, degree)) for index, name in parts]
        return Held(parameter, shape, blocks)

    def _step(self) -> float:
        """Clip, step, and forget the gradients. Returns the norm before clipping."""
        if self._job.layout.options["zero_stage"]:
            self._take_step()
            return float(self._engine.get_global_grad_norm())
        norm = self._gradient_norm()
        if self._train.clip_grad_norm:
            scale = (self._train.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for parameter in self._decoder.parameters():
                parameter.grad.mul_(scale)
        self._take_step()
        return float(norm)

    def _take_step(self) -> None:
        self.before_update()
        self._shared.remember()
        self._engine._exec_optimizer_step() if self._pipeline else self._engine.step()

    def _gradient_norm(self) -> Tensor:
        """Of all parameters, each once. DeepSpeed's own, without ZeRO, is the mean of the norms of what ranks hold."""
        squares = torch.zeros(2, dtype=torch.float64, device=self._device)
        for parameter in self._decoder.parameters():
            if parameter.model_parallel:
                squares[int(hasattr(parameter, "group_name"))] += parameter.grad.float().norm().double().square()
        if self._layout.ep > 1:
            dist.all_reduce(squares[1:], group=deepspeed_groups._EXPERT_PARALLEL_GROUP[EXPERT_GROUP])
        dist.all_reduce(squares, group=self._mesh.model)
        return squares.sum().sqrt()

    def _routers(self) -> Iterator[tuple[str, Router]]:
        """Those that are balanced by a bias."""
        for name, module in self._decoder.named_modules():
            if isinstance(module, Router) and self._job.model.router_bias:
                yield name, module

    def _update_router_biases(self) -> None:
        for _, router in self._routers():
            dist.all_reduce(router.load, group=self._mesh.data)
            router.update_bias()

    def _put(self, batches: Sequence[Batch]) -> tuple[list[MicroBatch], Tensor]:
        """This rank's part of `batches`, and how many labels count over all ranks', float64 []."""
        parts = [MicroBatch.of(batch, self._mesh, self._device) for batch in batches]
        counted = torch.stack([part.mask.sum(dtype=torch.float64) for part in parts]).sum()
        dist.all_reduce(counted, group=self._mesh.data)
        return parts, counted

    def _reseed(self, step: int) -> None:
        seed = int(np.random.SeedSequence((self._train.seed, step)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
