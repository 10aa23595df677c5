"""The Megatron-Core engine: one rank's part of a model in training, over gloo on CPUs and over NCCL on GPUs."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from jobs.errors import InputError
from jobs.spec import JobSpec
from models.megatron_shards import megatron_shards
from models.megatron_specs import Layer, build_model, transformer_config
from models.sparse_experts import SparseExperts
from models.weights import Shard, Source, drawn, fill
from orchestrator.files import FileEntry, Hook, unhindered
from orchestrator.worker.engines.cuda_stand_in import install, part_gradients_from_activations, repair_megatron
from orchestrator.worker.engines.expert_loads import ExpertLoads
from orchestrator.worker.engines.megatron_batches import LocalBatch, local_batch
from orchestrator.worker.engines.megatron_checkpoint import count_padding, load_sharded, save_sharded
from orchestrator.worker.engines.protocol import KEPT, Batch, StateSource, StepResult
from orchestrator.worker.engines.routed_rows import RoutedRows
from orchestrator.worker.engines.shared_experts import SharedExperts, sharing
from orchestrator.worker.engines.state_tensors import each_once, nothing, tensors_of
from orchestrator.worker.engines.swapping import swapping
from parallel.layout import Layout

# isort: split
# After models.megatron_specs, which decides how Megatron is imported.
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from models.megatron_sparse import sharded_experts, share_experts
from orchestrator.worker.engines.megatron_state import State

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def build(job: JobSpec, layout: Layout, device: torch.device) -> MegatronEngine:
    """Set up this rank's part of `job` at `layout` on `device`.

    Wants torch.distributed initialised with layout.world ranks, gloo for a CPU or NCCL with the device set for a GPU.
    Once a process: Megatron's parallel state is global. InputError where the job needs DeepEP and this node has none.
    """
    if job.model.is_moe and job.layout.dispatcher == "flex" and not HAVE_DEEP_EP:
        raise InputError("layout.dispatcher", "flex", "DeepEP (the module deep_ep) is not installed here", "alltoall")
    if device.type == "cpu":
        install()
    repair_megatron()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_distributed_optimizer_instances=job.layout.options["optimizer_replicas"],
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )
    if layout.pp == 2 and layout.vpp > 1:
        part_gradients_from_activations(dist.new_subgroups_by_enumeration(layout.groups("pp"))[0])
    engine = MegatronEngine(job, layout, device)
    # Megatron collects garbage whenever it gathers optimizer state: 0.3 s a time over all that was ever imported.
    gc.freeze()
    return engine


class MegatronEngine:
    """Implements `orchestrator.worker.engines.protocol.Engine`. All ranks of a DP coordinate are given equal batches.

    Loss and gradients are means over the counted labels of the whole global batch. With the sequence-wise balancing
    loss, what is optimised does not depend on dp, on the micro-batch, or on any other degree. Norms and biases are not
    decayed.
    """

    parameters: int

    def __init__(self, job: JobSpec, layout: Layout, device: torch.device) -> None:
        self._job, self._train, self._layout, self._device = job, job.train, layout, device
        self.before_update: Callable[[], None] = nothing
        self._reseed(0)
        config = transformer_config(job, layout)
        self._last_stage = parallel_state.is_pipeline_last_stage()
        group = parallel_state.get_expert_model_parallel_group()
        shared = sharing(job, layout, group, device)
        experts = sharded_experts(job.model, *shared) if shared else None
        self._models = [
            build_model(job, config, device, index if layout.vpp > 1 else None, experts) for index in range(layout.vpp)
        ]
        owned = [share_experts(model) for model in self._models] if shared else []
        if self._last_stage and layout.vpp == 1:
            for each in filter(None, owned):
                each.turn()
        fill(self._shards(), drawn(job.model, self._train.seed))
        self._swap = swapping(job, device)
        for layer in (module for model in self._models for module in model.modules()):
            if isinstance(layer, Layer):
                layer.swap = self._swap
        modules = (module for model in self._models for module in model.modules())
        held = (module.experts for module in modules if isinstance(module, MoELayer))
        routers = {
            layer.layer_number - 1: layer.mlp.router
            for model in self._models
            for layer in model.modules()
            if isinstance(layer, TransformerLayer) and isinstance(layer.mlp, MoELayer)
        }
        tokens = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        self._loads = ExpertLoads(routers, lambda routed: routed[1].sum(0), tokens)
        self._rows = RoutedRows(each.arrivals if isinstance(each, SparseExperts) else each for each in held)
        self._chunks = [self._distributed(config, model) for model in self._models]
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=self._train.learning_rate,
                weight_decay=self._train.weight_decay,
                adam_beta1=self._train.adam_beta1,
                adam_beta2=self._train.adam_beta2,
                adam_eps=self._train.adam_epsilon,
                clip_grad=self._train.clip_grad_norm or math.inf,  # 0 would leave the norm uncomputed
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=True,
            ),
            self._chunks,
            use_gloo_process_groups=False,
        )
        # Adam's moments exist from the start: memory peaks in the first step, and step 0 can be saved.
        for optimizer in self._optimizer.chained_optimizers:
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
        self._state = State(self._optimizer)
        replicas = parallel_state.get_expert_data_parallel_group()
        self._shared = SharedExperts(owned, group, replicas, self._state)
        no_sync = [chunk.no_sync for chunk in self._chunks]
        config.no_sync_func = no_sync if layout.vpp > 1 else no_sync[0]
        config.finalize_model_grads_func = finalize_model_grads
        self._forward_backward = get_forward_backward_func()
        self.parameters = self._count_parameters()

    def train_step(self, step: int, learning_rate: float, batches: Sequence[Batch]) -> StepResult:
        self._reseed(step)
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        self._rows.take()
        self._loads.begin_step(step)
        self._shared.begin_step()
        loss = self._run(batches, forward_only=False)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
            group["weight_decay"] = self._train.weight_decay * group["wd_mult"]
        self.before_update()
        self._shared.remember()
        _, grad_norm, _ = self._optimizer.step()
        self._shared.end_step(step)
        # One broadcast from the last rank, which is on the last stage: equal everywhere to the last bit.
        figures = torch.stack((loss, torch.as_tensor(grad_norm, dtype=torch.float64, device=self._device)))
        dist.broadcast(figures, src=self._layout.world - 1)
        swapped = self._swap.take_figures() if self._swap else None
        return StepResult(*figures.tolist(), self._rows.take(), self._loads.end_step(), swapped)

    def evaluate(self, batches: Sequence[Batch]) -> float:
        for chunk in self._chunks:
            chunk.eval()
        with torch.no_grad():
            loss = self._run(batches, forward_only=True)
        dist.broadcast(loss, src=self._layout.world - 1)
        return loss.item()

    def set_weights(self, source: Source) -> None:
        with self._shared.as_expert_parallel():
            fill(self._shards(), source)
            self._optimizer.reload_model_params()

    def weights(self) -> Iterator[Shard]:
        with self._shared.as_expert_parallel():
            for shard in self._shards():
                yield replace(shard, part=shard.read())

    def adopt(self, source: StateSource, steps: int) -> None:
        fill(self._shards(), partial(source, "weight"))
        for optimizer in self._optimizer.chained_optimizers:
            for group in optimizer.optimizer.param_groups:
                group["step"] = steps
        for kept in KEPT:
            for model in self._models:
                fill(
                    megatron_shards(model, self._job.model, self._layout, 0, partial(self._state.held, kept)),
                    partial(source, kept),
                )

    def state(self) -> list[torch.Tensor]:
        held = [tensor.data for model in self._models for tensor in (*model.parameters(), *model.buffers())]
        for optimizer in self._optimizer.chained_optimizers:
            held += tensors_of(optimizer.optimizer)
        return each_once(held)

    def restored(self, step: int) -> None:
        for optimizer in self._optimizer.chained_optimizers:
            for group in optimizer.optimizer.param_groups:
                if "step" in group:
                    group["step"] = step
        self._shared.restored()

    def save(self, folder: Path, before: Hook = unhindered) -> list[FileEntry]:
        with self._shared.as_expert_parallel():
            return save_sharded(self._models, self._optimizer, folder, before)

    def load(self, folder: Path) -> None:
        self._shared.forget_owners()
        load_sharded(self._models, self._optimizer, folder)
        self._shared.go_to_owners()

    def _shards(self) -> Iterator[Shard]:
        for model in self._models:
            yield from megatron_shards(model, self._job.model, self._layout, dist.get_rank())

    def _distributed(self, config: TransformerConfig, model: GPTModel) -> DistributedDataParallel:
        # Float16Module is named by Megatron for what it does to inputs and outputs too: fp32 logits, bf16 between.
        chunk = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,
                use_distributed_optimizer=True,
                num_distributed_optimizer_instances=self._job.layout.options["optimizer_replicas"],
            ),
            Float16Module(config, model) if config.bf16 else model,
        )
        count_padding(chunk)
        return chunk

    def _run(self, batches: Sequence[Batch], *, forward_only: bool) -> torch.Tensor:
        """Mean loss [] over all ranks' batches, float64, right on the last stage; leaves finalised gradients."""
        held = [local_batch(batch, self._layout, dist.get_rank(), self._device) for batch in batches]
        data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        counted = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in held]).sum()
        dist.all_reduce(counted, group=data)
        # Megatron divides a micro-batch's loss by their number, multiplies it by cp and averages gradients over DP and
        # CP: a sum of losses times this becomes the mean over the global batch. Its own per-token mode would shrink the
        # z-loss by 1/tp.
        scale = len(batches) * self._layout.dp / counted

        def forward_step(source: Iterator[LocalBatch], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
            batch = next(source)
            output = model(
                batch.tokens, batch.positions, batch.documents, labels=batch.labels, loss_mask=batch.loss_mask
            )

            def loss_of(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return total * scale.float(), total.detach()

            return output, loss_of

        totals = self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(held) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=len(batches[0].tokens),
            forward_only=forward_only,
        )
        loss = torch.stack(totals).double().sum() if self._last_stage else torch.zeros_like(counted)
        dist.all_reduce(loss, group=data)
        return loss / counted

    def _reseed(self, step: int) -> None:
        seed = int(np.random.SeedSequence((self._train.seed, step)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)

    def _count_parameters(self) -> int:
        """Every trained element once: not replicas beyond the first, nor the last stage's tied embedding."""
        held = sum(
            entry.data.numel()
            for model in self._models
            for name, entry in model.sharded_state_dict().items()
            if isinstance(entry, ShardedTensor | ShardedTensorFactory)
            and not any(entry.replica_id)
            and not name.endswith(".expert_bias")
        )
        total = torch.tensor(held, device=self._device)
        dist.all_reduce(total)
        return int(total)
