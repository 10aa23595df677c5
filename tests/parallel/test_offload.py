"""Swapped and recomputed tokens change no gradient, whatever is copied when."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import schedules
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedules import Pass
from torch import Tensor, nn

from jobs.architecture import ModelArchitecture
from models.deepspeed_experts import group_experts
from models.deepspeed_swap import swap_layers
from models.reference import Context, Layer
from parallel import offload, offload_visit
from parallel.host_link import ThreadLink
from parallel.offload import WHOLE, Swap

MODEL = ModelArchitecture(
    name="sparse",
    vocab=32,
    hidden=16,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=4,
    ffn=24,
    first_dense_layers=2,
    experts=4,
    top_k=2,
    expert_ffn=12,
    shared_expert_ffn=8,
    aux_loss=0.1,
    z_loss=0.01,
)
TOKENS = 20
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SLICE", 7)


class Chunk(nn.Module):
    """Some layers of a pipeline stage."""

    def __init__(self, layers: range, batch: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(MODEL, index) for index in layers)
        self.context = Context(torch.arange(TOKENS).expand(batch, -1))

    def forward(self, hidden: Tensor) -> Tensor:
        total = hidden.new_zeros(())
        for layer in self.layers:
            hidden, auxiliary = layer(hidden, self.context)
            total = total + auxiliary
        return hidden + total


def chunks(number: int, batch: int = 1) -> nn.ModuleList:
    """A stage of virtual stages, fp64."""
    torch.manual_seed(5)
    each = MODEL.layers // number
    made = nn.ModuleList(Chunk(range(at * each, (at + 1) * each), batch) for at in range(number)).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    group_experts(made, None)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def gradients(stage: nn.ModuleList, schedule: Sequence[Pass], batch: int = 1, times: int = 1) -> dict[str, Tensor]:
    """Of parameters and inputs, of the last time."""
    found: dict[str, Tensor] = {}
    for _ in range(times):
        stage.zero_grad()
        given, made = {}, {}
        for is_forward, chunk, micro_batch in schedule:
            key = chunk, micro_batch
            if is_forward:
                made_by = torch.Generator().manual_seed(100 * chunk + micro_batch)
                given[key] = torch.randn(batch, TOKENS, MODEL.hidden, generator=made_by, dtype=torch.float64)
                made[key] = stage[chunk](given[key].requires_grad_())
            else:
                out = made.pop(key)
                out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        found = {name: each.grad.clone() for name, each in stage.named_parameters()}
        found |= {f"input {key}": each.grad for key, each in given.items()}
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


ALONE = (Pass(True, 0, 0), Pass(False, 0, 0))


@pytest.mark.parametrize(
    ("fraction", "again"),
    [(0.0, ()), (0.25, ()), (0.5, ()), (1.0, ()), (0.5, ("mlp",)), (1.0, ("mlp", "moe")), (0.0, (WHOLE,))],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_are_those_of_whole_layers(fraction: float, again: tuple[str, ...], batch: int) -> None:
    expected = gradients(chunks(1, batch), ALONE, batch)
    stage = chunks(1, batch)
    swap = Swap(CPU, fraction, again=again)
    swap_layers(stage, swap)
    close(gradients(stage, ALONE, batch), expected)
    first = swap.take_figures()
    close(gradients(stage, ALONE, batch, times=2), expected)
    later = swap.take_figures()
    assert first.copied > 0
    # Once the order is known, the last two of four layers stay.
    assert later.copied < 2 * first.copied


@given(tokens=st.integers(0, 300_000), most=st.sampled_from((7, 1024, 16_384)))
def test_slices_are_few_and_of_whole_tiles(tokens: int, most: int) -> None:
    slices = offload_visit._evenly(tokens, most)
    assert sum(slices) == tokens
    assert len(slices) == -(-tokens // most)
    tile = offload_visit.GRANULE if tokens >= 32 * offload_visit.GRANULE and most > 7 else 1
    assert all(each > 0 and each % tile == 0 for each in slices[:-1])
    assert max(slices, default=0) - min(slices, default=0) < 2 * tile


def test_host_memory_that_is_full_leaves_layers_on_the_device() -> None:
    expected = gradients(chunks(1), ALONE)
    stage = chunks(1)
    swap = Swap(CPU, 0.5, host_bytes=20_000)
    swap_layers(stage, swap)
    close(gradients(stage, ALONE, times=2), expected)
    figures = swap.take_figures()
    assert figures.left > 0
    assert swap.slab.size <= 20_000


@pytest.mark.parametrize("seed", range(60))
def test_random_schedules_with_delays(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(offload, "SLICE", schedules.SLICE)
    _, wrong = schedules.tried(seed)
    assert not wrong


@pytest.mark.parametrize("seed", [1, 4, 9])
def test_a_models_layers_in_random_schedules(seed: int) -> None:
    draw = random.Random(seed)
    drawn = schedules.schedule(draw)
    expected = gradients(chunks(drawn.chunks), drawn.passes)
    stage = chunks(drawn.chunks)
    link = ThreadLink(lambda: draw.choice((0, 0, 0.0002, 0.002)))
    swap_layers(stage, Swap(CPU, draw.choice((0, 0.25, 0.5, 1)), draw.choice((30_000, 1e9)), link))
    close(gradients(stage, drawn.passes, times=2), expected)


def test_a_copy_that_comes_too_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the schedules are for: a reload that does not wait for its copy out gives wrong gradients."""
    monkeypatch.setattr(offload, "SLICE", schedules.SLICE)
    ordered = ThreadLink.copy
    monkeypatch.setattr(ThreadLink, "copy", lambda link, out, pairs, after: ordered(link, out, pairs, []))
    monkeypatch.setattr(offload.Swap, "wait", lambda swap, moment: None)
    assert any(schedules.tried(seed)[1] for seed in range(20))
