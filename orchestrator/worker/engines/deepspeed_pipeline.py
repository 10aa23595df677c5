"""DeepSpeed's pipeline (1F1B; Narayanan et al. 2019, DeepSpeed's PipelineEngine) over stages of the reference model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import InferenceSchedule, OptimizerStep, PipeInstruction, TrainSchedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from models.stages import Stage
from orchestrator.worker.engines.deepspeed_mesh import Mesh
from orchestrator.worker.engines.deepspeed_model import MicroBatch, total_cross_entropy


class Pipeline(PipelineModule):
    """One module a stage, of which a rank has its own; a layout's order of ranks is DeepSpeed's pipe-data-model.

    The engine's `train_batch` is not called, but its parts: it would want to know the number of micro-batches
    beforehand, and step without being asked.
    """

    def __init__(self, stage: Stage, mesh: Mesh, *, tied: bool) -> None:
        layout = mesh.layout
        stages: list[nn.Module] = [nn.Identity() for _ in range(layout.pp)]
        stages[mesh.at["pp"]] = stage
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how layers lie
            super().__init__(
                stages,
                topology=PipeModelDataParallelTopology(layout.pp, layout.tp, layout.cp * layout.dp),
                loss_fn=self._loss,
                partition_method="uniform",
            )
        self._stage, self._mesh = stage, mesh
        self._tied = self._tied_embedding() if tied else []
        self._scale: Tensor
        self._total: Tensor

    def run(
        self, engine: PipelineEngine, batches: Sequence[MicroBatch], scale: Tensor, *, forward_only: bool
    ) -> Tensor:
        """Sum of cross-entropies over this rank's `batches`, fp64 [], 0 but in the last stage.

        Of `scale` times them, and of auxiliary losses that are means over `batches`, gradients are averaged over data
        parallel ranks when it returns. Collective over the pipeline.
        """
        self._scale, self._total = scale, torch.zeros((), dtype=torch.float64, device=scale.device)
        self._stage.contexts = iter([batch.context for batch in batches])
        self._stage.auxiliary_weight = 1 / len(batches)
        engine.set_dataiterator(iter([(batch.tokens, (batch.labels, batch.mask)) for batch in batches]))
        # Stages agree on shapes anew: those of a validation need not be those of a step.
        engine.reset_activation_shape()
        engine.total_loss, engine._compute_loss = None, True
        schedule = InferenceSchedule if forward_only else _WithoutStep
        engine._exec_schedule(schedule(len(batches), self._mesh.layout.pp, self._mesh.at["pp"]))
        return self._total

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, dist.ProcessGroup]]:
        """What DeepSpeed sums the gradients of over stages, before it averages them over data parallel ranks.

        Its own way of tying wants the embedding and the head to be modules by themselves.
        """
        return self._tied

    def _loss(self, logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        total = total_cross_entropy(logits, *labels, self._mesh)
        self._total += total.detach()
        return total * self._scale

    def _tied_embedding(self) -> list[tuple[Tensor, dist.ProcessGroup]]:
        tied: list[tuple[Tensor, dist.ProcessGroup]] = []
        for members in self._mesh.layout.groups("pp"):
            ends = [members[0], members[-1]]
            group = dist.new_group(ends)
            if dist.get_rank() in ends:
                tied.append((self._stage.embedding.weight, group))
        return tied


class _WithoutStep(TrainSchedule):
    """All of a step but the optimizer's."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for instructions in super().steps():
            yield [one for one in instructions if not isinstance(one, OptimizerStep)]
