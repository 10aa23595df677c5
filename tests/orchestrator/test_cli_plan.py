"""`fivefold plan` in this process: what it ranks, explains and writes, and what it refuses."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from commands import Answered, Fivefold, refused

JOB = ("plan", "mixtral_8x7b", "cluster.nodes=4")


def line_of(answer: Answered, start: str) -> str:
    return next(line for line in answer.out.splitlines() if line.startswith(start))


def test_the_explanation_sums_to_what_is_predicted(fivefold: Fivefold) -> None:
    document = fivefold(*JOB, "--explain", "--json").document
    best, explanation = document["plans"][0], document["explanation"]
    assert sum(explanation["time_seconds"].values()) == pytest.approx(best["step_seconds"])
    assert sum(explanation["memory_bytes"].values()) == best["memory_bytes"]["total"]
    answer = fivefold(*JOB, "--explain")
    assert f"{best['step_seconds'] * 1e3:,.1f} ms" in line_of(answer, "total")
    for neighbour in explanation["neighbours"]:
        if neighbour["obstacle"]:
            assert neighbour["step_seconds"] is None
            assert neighbour["obstacle"] in re.sub(r"\s+", " ", answer.out)
        else:
            assert neighbour["step_seconds"] + neighbour["seconds_gained"] == pytest.approx(best["step_seconds"])
    short = [each for each in explanation["neighbours"] if each["missing_bytes"] and each["seconds_gained"] > 0]
    promised = re.findall(
        r"^[\d.]+ [GM]B more would allow .*: a step [\d.]+% shorter than this plan's$", answer.out, re.MULTILINE
    )
    assert len(promised) == bool(short)


def test_other_hardware_is_held_against_the_clusters_own(fivefold: Fivefold) -> None:
    own = fivefold(*JOB, "--json").document["plans"][0]
    document = fivefold(*JOB, "--what-if", "hardware.memory=141GB", "--json").document
    assert document["what_if"] == {"assumed": ["hardware.memory=141GB"], "without": own, "without_reason": None}
    assert document["plans"][0]["step_seconds"] <= own["step_seconds"]
    answer = fivefold(*JOB, "--what-if", "hardware.memory=141GB")
    assert line_of(answer, "what if") == "what if  memory_bytes were 141.00 GB, not 84.94 GB"
    assert "% shorter than " in line_of(answer, "         then ")


def test_hardware_that_makes_a_job_fit(fivefold: Fivefold) -> None:
    assert "GiB a device" in refused(fivefold("plan", "mixtral_8x7b"), "cluster.nodes=1")
    answer = fivefold("plan", "mixtral_8x7b", "--what-if", "hardware.memory=192GB")
    assert answer.code == 0
    assert line_of(answer, "         then ").endswith("is best; as it is, nothing fits")


def test_days_and_cost(fivefold: Fivefold) -> None:
    document = fivefold(*JOB, "--tokens", "1T", "--price", "2.5", "--json").document
    for plan in document["plans"]:
        assert plan["days"] == pytest.approx(1e12 / plan["tokens_per_second"] / 86400)
        assert plan["cost"] == pytest.approx(plan["days"] * 24 * 32 * 2.5)
    lines = fivefold(*JOB, "--tokens", "1T", "--price", "2.5").out.splitlines()
    assert lines[3].split()[-2:] == ["days", "cost"]
    best = document["plans"][0]
    assert lines[4].split()[-2:] == [f"{best['days']:,.1f}", f"{best['cost']:,.0f}"]
    assert fivefold(*JOB, "--tokens", "1T").out.splitlines()[3].split()[-1] == "days"


def test_a_sweep_ranks_shapes(fivefold: Fivefold) -> None:
    asked = (*JOB, "--sweep", "model.hidden=3584,4096", "--sweep", "model.layers=32,36", "--tokens", "1T")
    shapes = fivefold(*asked, "--json").document["shapes"]
    assert len(shapes) == 4
    (first, second) = (shape for shape in shapes if shape["plan"])
    assert first["plan"]["tokens_per_second"] >= second["plan"]["tokens_per_second"]
    lines = fivefold(*asked).out.splitlines()
    assert lines[3].split() == [
        *("hidden", "layers", "parameters", "active", "best", "layout", "tokens/s", "MFU", "days")
    ]
    assert lines[4].split()[:3] == ["1", *first["values"].values()]
    assert sum("of the job's 46.70 B" in line for line in lines) == 2


def test_megatrons_flags_are_of_the_best_plan(fivefold: Fivefold) -> None:
    document = fivefold(*JOB, "--format", "megatron", "--json").document
    layout = document["plans"][0]["layout"]
    flags = fivefold(*JOB, "--format", "megatron").out.splitlines()
    assert flags == document["megatron"]
    assert f"--pipeline-model-parallel-size {layout['pp']}" in flags
    assert f"--expert-tensor-parallel-size {layout['etp']}" in flags
    assert all(flag.startswith("--") for flag in flags)


def test_deepspeeds_config_is_of_the_best_plan(fivefold: Fivefold) -> None:
    document = fivefold(*JOB, "engine=deepspeed", "layout.pp=2", "--format", "deepspeed", "--json").document
    best = document["plans"][0]
    answer = fivefold(*JOB, "engine=deepspeed", "layout.pp=2", "--format", "deepspeed")
    config = json.loads(answer.out)
    assert config == document["deepspeed"]
    assert config["gradient_accumulation_steps"] == best["micro_batches"]
    assert config["train_batch_size"] == best["layout"]["dp"] * best["micro_batch"] * best["micro_batches"]
    assert "not in the file: pp=2: PipelineModule" in answer.err


LONG = ("plan", "llama3_8b", "cluster=h200_x8", "train.sequence_length=65536", "train.global_batch=8")


def test_swapped_activations_are_planned_and_told(fivefold: Fivefold) -> None:
    auto = (*LONG, "layout.offload_activations=auto")
    document = fivefold(*auto, "--explain", "--json").document
    best = document["plans"][0]
    assert 0 < best["options"]["offload_activations"] <= 1
    neighbours = document["explanation"]["neighbours"]
    assert {"offload_activations": None} in [each["change"] for each in neighbours]
    answer = fivefold(*auto)
    assert (answer.code, answer.err) == (0, "")
    assert f"offload_activations {best['options']['offload_activations']:g}" in line_of(answer, " 1  ")
    slow = fivefold(*LONG, "layout.offload_activations=0", "layout.dp=8", "--what-if", "hardware.host_link=1GB/s")
    assert "fivefold: layout.offload_activations=0.0: a dense layer's " in slow.err
    few = fivefold(*auto, "--what-if", "hardware.host_memory=1MB")
    assert "fivefold: layout.offload_activations=auto: all activations stay: " in few.err
    assert "offload_activations" not in few.out.split("what if")[0]


@pytest.mark.parametrize("share", ["some", "1.5", "-1"])
def test_what_is_no_share_of_tokens(fivefold: Fivefold, share: str) -> None:
    said = refused(fivefold("plan", "quickstart", f"layout.offload_activations={share}"), "layout.offload_activations=")
    assert said.endswith(": is auto, null or a share from 0 to 1")


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_no_framework_has_a_flag_for_swapped_activations(fivefold: Fivefold, engine: str) -> None:
    asked = (*LONG, f"engine={engine}", "layout.offload_activations=0.5", "--format", engine)
    answer = fivefold(*asked)
    where = "not among the flags" if engine == "megatron" else "not in the file"
    assert f"{where}: offload_activations=0.5: " in answer.err


def test_a_picture_shows_every_stage(fivefold: Fivefold, tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    answer = fivefold(*JOB, "layout.pp=4", "layout.vpp=2", "layout.recompute=full", "--picture", str(file))
    assert answer.out.splitlines()[-1] == f"picture  {file}"
    text = file.read_text(encoding="utf-8")
    step = re.search(r"([\d,]+) ms a step", text)
    spent = re.search(r"One step: ([\d,]+) ms of schedule, [\d.]+% of it idle, then ([\d,]+) ms", text)
    assert step is not None
    assert spent is not None
    predicted, scheduled, after = (int(each.replace(",", "")) for each in (*step.groups(), *spent.groups()))
    assert scheduled + after == pytest.approx(predicted, abs=1)
    assert "<script" not in text
    assert not re.search(r"(href|src)=", text)
    memory, timeline = (ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    space = "{http://www.w3.org/2000/svg}"
    stages = [f"stage {index}" for index in range(4)]
    for drawn in (memory, timeline):
        assert [each.text for each in drawn.iter(f"{space}text") if str(each.text).startswith("stage")] == stages
    parts = {str(each.text).partition(":")[0] for each in memory.iter(f"{space}title")}
    assert parts >= {"weights", "gradients", "optimizer", "activations"}
    paths = [each.get("d", "") for each in timeline.iter(f"{space}path")]
    assert len(paths) == 4 * 2 * 2  # stages, chunks, forward and backward
    assert len({path.count("M") for path in paths}) == 1  # as many boxes each as micro-batches


@pytest.mark.parametrize(
    ("arguments", "path", "nearest"),
    [
        (("--format", "megatrn"), "--format", "megatron"),
        (("--format", "deepspeed"), "engine", "deepspeed"),
        (("--what-if", "cluster.nodes=8"), "--what-if", "hardware.memory=141GB"),
        (("--what-if", "hardware.memory=a lot"), "hardware.memory", "141GB"),
        (("--sweep", "model.hiden=1,2"), "--sweep", "model.hidden"),
        (("--sweep", "layout.tp=1,2"), "--sweep", None),
        (("--tokens", "many"), "--tokens", "1T"),
        (("--price", "2"), "--price", "--tokens 1T"),
        (("--picture", "plan.png"), "--picture", "plan.html"),
        (("--picture", "no/such/plan.html"), "--picture", None),
    ],
)
def test_what_cannot_be_asked(fivefold: Fivefold, arguments: Any, path: str, nearest: str | None) -> None:
    refused(fivefold(*JOB, *arguments), path, nearest)
    refused(fivefold(*JOB, *arguments, "--json"), path, nearest)


def test_a_job_that_fits_nowhere_hears_what_holds_the_memory_and_what_would_do(fivefold: Fivefold) -> None:
    said = refused(fivefold("plan", "mixtral_8x22b"), "cluster.nodes=1")
    assert re.search(r"needs [\d.]+ GiB a device, which has 79\.1 GiB; of that \w+ [\d.]+ GiB, \w+ ", said)
    said = refused(fivefold("plan", "mixtral_8x22b", "cluster.nodes=3", "train.global_batch=192"), "cluster.nodes=3")
    nodes = int(said.rpartition("nodes=")[2])
    assert fivefold("plan", "mixtral_8x22b", f"cluster.nodes={nodes}", "train.global_batch=192").code == 0
