"""A model whose experts are owned and copied anyhow is the model: logits and gradients in fp64, on 2, 4 and 8 ranks."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jobs.architecture import ModelArchitecture
from models.deepspeed_experts import shard_experts
from models.deepspeed_swap import swap_layers
from models.reference import Decoder
from models.sparse_owners import Owned
from models.weights import draw
from orchestrator.worker.ranks import Ranks
from parallel import offload
from parallel.collectives import Lane
from parallel.estimates.hardware import Link
from parallel.fssdp import Limits, Means, Wire
from parallel.fssdp_dispatch import Topology
from parallel.offload import Swap
from parallel.placement import Placement

MODEL = ModelArchitecture(
    name="sparse",
    init_std=0.2,
    layers=4,
    hidden=16,
    heads=2,
    kv_heads=2,
    head_dim=8,
    ffn=24,
    vocab=32,
    first_dense_layers=1,
    experts=8,
    top_k=2,
    expert_ffn=8,
    shared_expert_ffn=8,
    aux_loss=0.1,
)
SEQUENCE = 12
MIXTURES = range(1, 4)


def rows(world: int) -> tuple[Tensor, Tensor]:
    """Of each rank one: tokens, few of them, so that routing is uneven, and what logits are multiplied with."""
    generator = torch.Generator().manual_seed(world)
    tokens = torch.randint(6, (world, SEQUENCE), generator=generator)
    return tokens, torch.randn(world, SEQUENCE, MODEL.vocab, generator=generator).double()


def whole(world: int) -> dict[str, Tensor]:
    decoder, (tokens, target) = Decoder(MODEL).double(), rows(world)
    for name, parameter in decoder.named_parameters():
        parameter.data.copy_(draw(name, tuple(parameter.shape), MODEL, 1, parameter.device))
    output = decoder(tokens)
    ((output.logits * target).sum() + output.auxiliary).backward()
    return {"logits": output.logits.detach()} | {name: each.grad for name, each in decoder.named_parameters()}


def anyhow(owned: Owned, world: int, seed: int) -> None:
    """Owners of all layers' experts by chance, equally many a rank and of a layer any number; and copies."""
    draw = random.Random(seed)
    dealt = [rank for rank in range(world) for _ in range(len(MIXTURES) * MODEL.experts // world)]
    draw.shuffle(dealt)
    for layer in owned.layers.values():
        layer.owners.copy_(torch.tensor([dealt.pop() for _ in range(MODEL.experts)]))
    owned.settle()
    for layer in owned.layers.values():
        share = draw.choice((0.0, 0.3, 1.0))
        layer.placement = Placement.of(
            world,
            ([owner, *(rank for rank in range(world) if draw.random() < share)] for (owner,) in layer.sharded.holders),
        )


@dataclass(frozen=True)
class Swapped:
    """How a layer's activations are kept."""

    fraction: float
    again: tuple[str, ...] = ()


def _trained(
    rank: int, world: int, seed: int, again: bool, means: Means, swapped: Swapped | None = None
) -> tuple[dict[str, np.ndarray], int]:
    """Gradients of this rank's loss: of what all have, to be added up; of experts, of those that it owns."""
    decoder = Decoder(MODEL).double()
    lane = Lane(dist.group.WORLD, dist.new_group(list(range(world))), torch.device("cpu"))
    owned = Owned(shard_experts(decoder, dist.group.WORLD, lane, means))
    if seed:
        anyhow(owned, world, seed)
    if seed % 2:
        owned.turn()
    named: dict[str, tuple[nn.Parameter, Any]] = {}
    for (layer, expert), (home, at) in zip(owned.experts, owned.places, strict=True):
        name = f"layers.{layer}.moe.experts.{expert}"
        named |= {f"{name}.gate.weight": (home.gate_up, (at, 0)), f"{name}.up.weight": (home.gate_up, (at, 1))}
        named[f"{name}.down.weight"] = (home.down, at)
    for name, parameter in decoder.named_parameters():
        if ".sparse." not in name:
            named[name] = (parameter, slice(None))
    for name, (parameter, at) in named.items():
        part = parameter.data[at]
        part.copy_(draw(name, tuple(part.shape), MODEL, 1, part.device))
    if again:
        decoder.layers = nn.ModuleList(Checkpointed(layer) for layer in decoder.layers)
    if swapped is not None:
        offload.SLICE = 5
        swap_layers(decoder, Swap(torch.device("cpu"), swapped.fraction, again=swapped.again))
    tokens, target = (part[rank : rank + 1] for part in rows(world))
    for _ in range(1 if swapped is None else 2):  # whose order of passes is known the second time
        decoder.zero_grad()
        output = decoder(tokens)
        ((output.logits * target).sum() + output.auxiliary / world).backward()
    copies = sum(layer.placement.copies for layer in owned.layers.values())
    found = {name: parameter.grad[at].numpy() for name, (parameter, at) in named.items()}
    return found | {"logits": output.logits.detach().numpy()}, copies


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *given: Any) -> Any:
        return checkpoint(self.layer, *given, use_reentrant=True)


def means(world: int, **changes: Any) -> Means:
    return replace(Means(Topology(world, 2), Limits(2, 6)), **changes)


def check(world: int, found: list[dict[str, np.ndarray]]) -> None:
    expected = whole(world)
    logits = np.concatenate([part.pop("logits") for part in found])
    np.testing.assert_allclose(logits, expected.pop("logits"), rtol=1e-12, atol=1e-12)
    for name, gradient in expected.items():
        parts = [part[name] for part in found if name in part]
        assert len(parts) == (1 if ".experts." in name else world)
        np.testing.assert_allclose(sum(parts), gradient, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("world", [2, 4, 8])
def test_gradients_do_not_depend_on_owners_nor_on_copies(ranks: Ranks, world: int, seed: int) -> None:
    found = ranks.run(world, _trained, world, seed, False, means(world))
    assert (found[0][1] > 0) == (seed > 0)
    check(world, [gradients for gradients, _ in found])


def test_layers_that_are_computed_again_have_their_copies_again(ranks: Ranks) -> None:
    found = ranks.run(4, _trained, 4, 2, True, means(4))
    check(4, [gradients for gradients, _ in found])


def test_copies_that_are_made_when_the_gate_has_spoken_change_nothing(ranks: Ranks) -> None:
    free = Wire(Link(bytes_per_second=1e15, latency_seconds=0.0), 1.0)
    found = ranks.run(4, _trained, 4, 3, False, means(4, token_seconds=1.0, wire=free))
    check(4, [gradients for gradients, _ in found])


SWAPPED = [Swapped(0.0), Swapped(0.5), Swapped(1.0), Swapped(0.5, ("moe",)), Swapped(0.0, ("layer",))]


@pytest.mark.parametrize("swapped", SWAPPED, ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_copies_are_there_for_tokens_that_are_swapped_and_computed_again(
    ranks: Ranks, world: int, swapped: Swapped
) -> None:
    free = Wire(Link(bytes_per_second=1e15, latency_seconds=0.0), 1.0)
    for case in (means(world), means(world, token_seconds=1.0, wire=free)):
        found = ranks.run(world, _trained, world, 2, False, case, swapped)
        check(world, [gradients for gradients, _ in found])
