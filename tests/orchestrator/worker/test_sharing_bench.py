"""`fivefold bench sharing`: routing whose loads are known, and steps of both ways on two ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.control import bench
from orchestrator.worker.benches import __main__ as benches
from orchestrator.worker.benches import sharing
from parallel.estimates.traces import inclusion, wandering
from parallel.fssdp_means import means_of, unshared


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (128, 8), (4, 3)])
@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_choices_have_the_loads_asked_for_and_each_token_as_many(experts: int, top_k: int, skew: float) -> None:
    shares = next(wandering(np.random.default_rng(3), experts, skew))
    likely = inclusion(shares, top_k)
    assert likely.sum() == pytest.approx(top_k)
    assert likely.max() <= 1
    spare = likely < 0.99
    assert np.ptp(likely[spare] / shares[spare]) < 1e-9 * (likely[spare] / shares[spare]).max()
    sums = np.cumsum([0.0, *likely])
    sums[-1] = top_k
    model = SimpleNamespace(router_score="softmax", router_normalize_top_k=True, router_scale=1.0)
    logits = torch.randn(512, 2, experts, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights, chosen = sharing.given(SimpleNamespace(model=model), logits, torch.from_numpy(sums))  # type: ignore[arg-type]
    assert (chosen.sum(-1) == top_k).all()
    np.testing.assert_allclose(chosen.sum(0).numpy(), 1024 * likely, atol=6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1024))
    assert (weights[~chosen] == 0).all()
    weights.square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0


def test_the_heaviest_expert_is_the_first_where_that_is_asked_for() -> None:
    steps = itertools.islice(wandering(np.random.default_rng(1), 8, 1.0, heaviest_first=True), 20)
    mean = np.mean(list(steps), axis=0)
    np.testing.assert_allclose(mean, (1 / np.arange(1, 9)) / (1 / np.arange(1, 9)).sum(), rtol=0.1)


def test_of_the_sizes_that_two_h200_run_experts_can_be_copied() -> None:
    for name in sharing.SHAPES["cuda"]:
        job = sharing.job_of("cuda", name, "fssdp")
        assert unshared(job) is None
        assert min(means_of(job).limits.slots, means_of(job).limits.movable) >= 3


def test_one_gpu_is_told_that_it_takes_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("sys.argv", ["benches", "sharing"])
    with pytest.raises(SystemExit, match="`sharing` takes 2 GPUs"):
        benches.main()


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    path = tmp_path_factory.mktemp("bench") / "sharing.json"
    return bench.measure("sharing", str(path), quiet=True), path


def test_both_ways_of_every_routing_have_times_loads_and_what_the_plan_says(
    document: tuple[dict[str, Any], Path],
) -> None:
    found, path = document
    assert json.loads(path.read_text()) == found
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    by_load = {(result["load"], result["way"]): result for result in found["results"]}
    routings = (sharing.EVEN, sharing.WORST, sharing.NATURAL, sharing.SHUFFLED)
    assert set(by_load) == set(itertools.product(routings, sharing.WAYS))
    for result in found["results"]:
        assert 0 < result["seconds"]["low"] <= result["seconds"]["median"] <= result["seconds"]["high"]
        assert result["predicted_seconds"] > 0
    for way in sharing.WAYS:
        assert by_load[sharing.EVEN, way]["busiest"] == {"mean": 1.0, "worst": 1.0}
        assert by_load[sharing.EVEN, way]["copies"] == 0
    # Of four experts the two heaviest have 0.72 of all: 1.44 times a rank's mean, until one is copied.
    assert by_load[sharing.WORST, "ep"]["busiest"]["mean"] == pytest.approx(1.44, abs=0.1)
    assert by_load[sharing.WORST, "fssdp"]["busiest"]["worst"] < sharing.BUSIEST
    assert by_load[sharing.WORST, "fssdp"]["copies"] > 0
    verdict = by_load[sharing.WORST, "fssdp"]["sharing"]
    assert verdict["evened_out"]
    assert verdict["met"] == (verdict["speedup"] >= 1.3)
