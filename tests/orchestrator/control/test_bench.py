"""`fivefold bench`: real timings on this machine, its document, its picture, and what it refuses before it times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import InputError
from orchestrator import cli
from orchestrator.control import bench


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    path = tmp_path_factory.mktemp("bench") / "kernels.json"
    return bench.measure("kernels", str(path), quiet=True), path


def test_every_way_of_every_work_has_times_and_an_error(document: tuple[dict[str, Any], Path]) -> None:
    found, path = document
    assert json.loads(path.read_text()) == found
    assert found["command"] == "fivefold bench kernels"
    experts = [result for result in found["results"] if result["work"] == "experts of small"]
    assert {(result["load"], result["way"]) for result in experts} == {
        (load, way) for load in ("even", "skewed") for way in ("fivefold", "torch grouped_mm", "loop", "padded bmm")
    }
    for result in experts:
        assert result["seconds"]["low"] <= result["seconds"]["median"] <= result["seconds"]["high"]
        assert result["share_of_matmul"] == result["flops_per_second"] / found["matmul_flops"]
        assert result["error"] < 1e-5
    ours, theirs = (
        next(result["kept_bytes"] for result in experts if result["way"] == way)
        for way in ("fivefold", "torch grouped_mm")
    )
    assert ours <= 0.6 * theirs
    missing = [result["way"] for result in found["results"] if "failed" in result]
    assert set(missing) <= {"liger"}


def test_a_picture_lies_beside(document: tuple[dict[str, Any], Path]) -> None:
    picture = document[1].with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_a_sweep_is_drawn_as_curves(tmp_path: Path, document: tuple[dict[str, Any], Path]) -> None:
    seconds = {"median": 0.1, "low": 0.1, "high": 0.1, "peak_bytes": None}
    results = [
        {"work": f"{kind} {size}", "way": "fivefold", "seconds": seconds, "flops_per_second": 1e12}
        | {"tokens_per_second": 1e5 / size}
        for kind in ("sequence", "experts")
        for size in (8, 16)
    ]
    bars = [
        {"work": "layer", "way": way, "seconds": seconds, "flops_per_second": 1e12} for way in ("fivefold", "other")
    ]
    bench.plot({"matmul_flops": 2e12, "results": [*bars, *results]}, tmp_path / "swept.png")
    assert (tmp_path / "swept.png").stat().st_size > 20_000


def test_a_peak_that_was_told_is_shown_beside_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"median": 6.5, "low": 6.5, "high": 6.5, "peak_bytes": 18_900_000_000}
    told = {"predicted_peak_bytes": 19_000_000_000, "predicted_notice": ""}
    placed = {"placed_bytes": 19_100_000_000, "placed_by": "greedy", "placed_gap": 0.005}
    ways = [
        {"work": "5 layers", "way": "swapped", "seconds": seconds, **told, **placed},
        {"work": "5 layers", "way": "kept", "seconds": seconds, "predicted_notice": "nothing was traced"},
    ]
    bench._show({"matmul_flops": 1e12, "machine": {"device": "H200"}, "results": ways})
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "swapped: 19.00 GB predicted before the first step, 18.90 GB measured (+0.5%); "
        "placed by greedy in 19.10 GB, 0.5% above the bound",
        "kept: nothing was traced",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "kernels", "--out", "figures.txt"], "--out=figures.txt: is a document, and ends in .json"),
        (["bench", "layer", "--out", "nowhere/at/all.json"], "--out=nowhere/at/all.json: nowhere/at is no folder"),
        (["bench", "train", "quickstart", "engine=deepspeed"], "engine=deepspeed: is benched by runs"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_timed(arguments: list[str], said: str) -> None:
    options = cli.parse(arguments)
    with pytest.raises(InputError) as caught:
        options.verb(options)
    assert str(caught.value).startswith(said)


def test_steps_of_a_job_are_timed() -> None:
    found = bench_train("quickstart", "layout.tp=2", "layout.ep=2", "train.sequence_length=64")
    (result,) = found["results"]
    assert result["work"] == "quickstart of 4 layers, 1.84 million parameters"
    assert result["seconds"]["median"] > 0
    assert result["loss"] < 6
    assert found["command"].endswith("train.sequence_length=64 --steps 1")
    assert found["layout"] == "tp2 dp2 ep2"


def bench_train(*asked: str) -> dict[str, Any]:
    from jobs.compose import compose
    from parallel.planning import planner

    job = compose(asked[0], asked[1:])
    plan = planner.plan_job(job).plans[0]
    return bench.train(planner.resolve(job, plan), plan, 1, asked, None, quiet=True)
