"""A job's training run on one device, by the reference model and torch's own AdamW: what every layout must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from jobs.spec import JobSpec
from jobs.tensors import tensors
from models.reference import Decoder
from models.weights import draw
from orchestrator.worker.engines.protocol import Batch


@dataclass(frozen=True)
class Training:
    curve: list[tuple[float, float]]
    """Loss and gradient norm of each step."""
    validation: float
    weights: dict[str, torch.Tensor]


def trained(job: JobSpec, steps: int, batch_of: Callable[[int], Batch], rate_of: Callable[[int], float]) -> Training:
    """`steps` steps in fp32, each on one whole global batch, then a validation on batch 0."""
    model, train = Decoder(job.model), job.train
    model.load_state_dict(
        {
            name: draw(name, shape, job.model, train.seed, torch.device("cpu"))
            for name, shape in tensors(job.model).items()
        }
    )
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
    )
    curve = []
    for step in range(1, steps + 1):
        loss, auxiliary = _losses(model, batch_of(step))
        optimizer.zero_grad()
        (loss + auxiliary).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    with torch.no_grad():
        validation = _losses(model, batch_of(0))[0].item()
    return Training(curve, validation, dict(model.state_dict()))


def _losses(model: Decoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, labels, mask = (torch.tensor(part) for part in (batch.tokens, batch.labels, batch.loss_mask))
    output = model(tokens, None if batch.documents is None else torch.tensor(batch.documents))
    losses = functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum(), output.auxiliary
