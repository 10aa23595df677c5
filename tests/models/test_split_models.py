"""One forward and backward of the reference model, divided over ranks, against the same on one; fp64."""

from __future__ import annotations

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.architecture import ModelArchitecture
from models.reference import Decoder
from models.stages import Stage
from models.tensor_parallel import block, split_tensors
from models.ulysses import part_of_context, part_of_rows, split_sequence
from models.weights import draw
from orchestrator.worker.ranks import Ranks
from parallel.layout import Layout
from parallel.process_groups import new_group

MODEL = ModelArchitecture(
    name="all",
    init_std=0.2,
    layers=2,
    hidden=16,
    heads=8,
    kv_heads=4,
    head_dim=2,
    ffn=24,
    vocab=32,
    first_dense_layers=1,
    attention_bias=True,
    qk_norm=True,
    experts=4,
    top_k=2,
    expert_ffn=8,
    shared_expert_ffn=12,
    shared_expert_gate=True,
    aux_loss=0.1,
    z_loss=0.1,
)
BATCH, SEQUENCE = 2, 8


def _data() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, what logits are multiplied with to make a loss, and documents."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(MODEL.vocab, (BATCH, SEQUENCE), generator=generator)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0] * SEQUENCE])
    return tokens, torch.randn(BATCH, SEQUENCE, MODEL.vocab, generator=generator).double(), documents


def _fill(module: nn.Module, tp: int = 1, index: int = 0) -> None:
    for name, parameter in module.named_parameters():
        shard = block(name, parameter.data, tuple(parameter.shape), index, tp)
        shard.write(shard.cut(draw(name, shard.shape, MODEL, 1, parameter.device)))


def _whole() -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of sum(logits * target) + auxiliary."""
    decoder, (tokens, target, documents) = Decoder(MODEL).double(), _data()
    _fill(decoder)
    output = decoder(tokens, documents)
    ((output.logits * target).sum() + output.auxiliary).backward()
    return output.logits.detach(), {name: parameter.grad for name, parameter in decoder.named_parameters()}


def _divided(rank: int, layout: Layout) -> tuple[np.ndarray, dict[str, tuple[tuple[slice, ...], np.ndarray]]]:
    """This rank's logits and gradients of its loss; both losses and gradients are to be added up over cp."""

    deepspeed.init_distributed("gloo", dist_init_required=False)
    at = layout.coordinates(rank)
    tensor, sequence = new_group(layout, "tp"), new_group(layout, "cp")
    stage, (tokens, target, documents) = Stage(MODEL, range(MODEL.layers)).double(), _data()
    split_tensors(stage, tensor)
    split_sequence(stage, sequence)
    _fill(stage, layout.tp, at["tp"])
    stage.contexts = iter([part_of_context(tokens, documents, sequence)])
    stage.auxiliary_weight = 1 / layout.cp
    logits = stage(part_of_rows(tokens, sequence))
    (logits * part_of_rows(target, sequence).chunk(layout.tp, -1)[at["tp"]]).sum().backward()
    gradients = {}
    for name, parameter in stage.named_parameters():
        dist.all_reduce(parameter.grad, group=sequence)
        offset, size = block(name, parameter.data, tuple(parameter.shape), at["tp"], layout.tp).offset, parameter.shape
        here = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
        gradients[name] = (here, parameter.grad.numpy())
    return logits.detach().numpy(), gradients


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(cp=2), Layout(tp=2, cp=2)], ids=lambda layout: layout.label)
def test_a_divided_model_has_the_logits_and_gradients_of_the_whole(ranks: Ranks, layout: Layout) -> None:
    logits, gradients = _whole()
    for rank, (part, found) in enumerate(ranks.run(layout.world, _divided, layout)):
        at = layout.coordinates(rank)
        expected = logits.chunk(layout.cp, 1)[at["cp"]].chunk(layout.tp, 2)[at["tp"]]
        np.testing.assert_allclose(part, expected, rtol=1e-11, atol=1e-11)
        assert found.keys() == gradients.keys()
        for name, (here, gradient) in found.items():
            np.testing.assert_allclose(gradient, gradients[name][here], rtol=1e-10, atol=1e-10, err_msg=name)
