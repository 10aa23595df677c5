"""Predictions beside measurements, their figures, and the fit of residuals."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel import validation
from parallel.estimates.costs import estimate_time
from parallel.estimates.hardware import hardware
from parallel.estimates.software import FACTS, OURS, Software, software, spread
from parallel.estimates.workload import Workload
from parallel.evidence import fitting
from parallel.evidence.published import COLUMNS, Row
from parallel.layout import Layout

# arXiv 2312.12391, the authors' ground truth: GPT of 39.1 billion parameters on 512 A100, and one that says too little.
GPT = {
    "row_id": "gpt", "source_id": "vtrain2024", "split": "validate", "model": "gpt-39.1b", "arch": "dense-gelu (GPT)",
    "layers": "48", "hidden": "8192", "ffn": "32768", "heads": "64", "kv_heads": "64", "vocab": "50257",
    "seq_len": "2048", "gbs": "1536", "mbs": "4", "gpus": "512", "gpu_type": "A100-80GB-SXM", "gpus_per_node": "8",
    "precision": "fp16", "tp": "8", "pp": "8", "vpp": "1", "dp": "8", "recompute": "full",
    "framework": "Megatron-DeepSpeed", "iter_time_s": "14.967", "inferred_fields": "inter-node 800 Gb/s",
}  # fmt: skip


# SimuMax (github.com/MooreThreads/SimuMax): 4 layers of DeepSeek-V2 on 8 B200, largest allocated GiB.
DEEPSEEK = GPT | {
    "source_id": "simumax", "model": "deepseekv2-4layers", "arch": "moe-mla", "layers": "4", "hidden": "5120",
    "ffn": "12288", "heads": "128", "kv_heads": "", "vocab": "102400", "experts": "160", "topk": "6",
    "moe_ffn": "1536", "shared_experts": "2", "seq_len": "4096", "gbs": "32", "mbs": "1", "gpus": "8",
    "gpu_type": "B200-180GB", "tp": "1", "pp": "1", "dp": "8", "ep": "8", "sp": "", "routing": "forced balance",
    "framework": "Megatron-LM 0.14 + TE", "mem_gb": "45.63", "status": "ok", "attn_kernel": "",
    "zero_stage": "1", "recompute": "none", "inferred_fields": "",
}  # fmt: skip


def row(**changes: str) -> Row:
    return Row(dict.fromkeys((*COLUMNS, "sweep_group", "tokens_s_gpu", "tflops_gpu", "mfu_pct"), "") | GPT | changes)


def test_a_step_on_512_devices_as_measured() -> None:
    assert validation.predict(row()).ratio == pytest.approx(1, abs=0.08)
    assert validation.predict(row(tp="8", pp="4", dp="16", mbs="8", iter_time_s="15.8145")).ratio == pytest.approx(
        1, abs=0.08
    )


def test_what_cannot_be_priced_carries_its_reason(tmp_path: Path) -> None:
    found = [validation.predict(each) for each in (row(), row(gpu_type="TPU"), row(layers=""))]
    path = tmp_path / "predictions.csv"
    validation.write(found, path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["reason"] for line in lines] == ["", "no profile of TPU", "layers is not published"]
    assert tuple(lines[0]) == validation.FIELDS
    assert 0 <= float(lines[0]["p_out_of_memory"]) <= 1
    assert float(lines[0]["predicted_memory_bytes"]) > 1e9
    assert float(lines[0]["step_seconds_low"]) < float(lines[0]["predicted_step_seconds"])
    assert lines[1]["predicted_step_seconds"] == ""


def test_a_device_without_a_profile_is_priced_as_the_nearest_and_that_is_said() -> None:
    near, own = (validation.predict(row(gpu_type=name)) for name in ("GB300 (NVL72)", "GB200 (NVL72)"))
    assert near.step_seconds == own.step_seconds
    assert near.reason.startswith("GB300 (NVL72) HAS NO PROFILE: planned as if it were gb200_nvl72")
    assert own.reason == ""


def test_what_a_row_leaves_open_is_chosen() -> None:
    assert {step.micro_batch for step in validation.candidates(row(mbs=""))} == {1, 2, 4, 8}
    assert {step.layout.vpp for step in validation.candidates(row(vpp=""))} == {1, 2, 3, 6}
    assert len(validation.candidates(row())) == 1
    # m=12 micro-batches are no whole groups of pp=8: no virtual stages.
    assert {step.layout.vpp for step in validation.candidates(row(vpp="", mbs="16"))} == {1}


def test_a_ranking() -> None:
    ranked = validation.rank([3.0, 1.0, 2.0], [30.0, 11.0, 10.0])
    assert (ranked.regret, ranked.place) == (pytest.approx(0.1), 2)
    assert ranked.correlation == pytest.approx(0.5)
    assert validation.rank([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).regret == 0


def test_the_figures_of_a_source() -> None:
    rows = [row(iter_time_s=str(10 + each), sweep_group="g") for each in range(10)]
    lines = validation.summary([validation.predict(each) for each in rows])
    assert lines[1].startswith("vtrain2024              validate     10     10")
    assert lines[3].split()[:3] == ["vtrain2024", "validate", "1"]


def test_memory_beside_what_was_measured() -> None:
    found = validation.predict(row(**DEEPSEEK))
    assert found.memory_error == pytest.approx(0, abs=0.03)
    assert (found.refused, found.row.ran_out) == (False, False)
    lines = [line.split() for line in validation.summary([found])]
    assert lines[-3][:3] == ["simumax", "validate", "1"]
    assert lines[-1] == ["simumax", "validate", "1", "100.0%", "0.0%", "0.0%"]


def test_outcomes_right_missed_and_refused() -> None:
    fits, large = {"mbs": "1", "tp": "8"}, {"mbs": "8", "tp": "1", "pp": "8", "dp": "64", "recompute": "none"}
    right, wrong = (
        [validation.predict(row(status=status, **layout)) for layout, status in zip((fits, large), said, strict=True)]
        for said in (("ok", "oom"), ("oom", "ok"))
    )
    assert validation.accuracy(right) == (1, 0, 0)
    assert validation.accuracy(wrong) == (0, 1, 1)
    assert validation.accuracy(right + wrong) == (0.5, 0.5, 0.5)
    assert (right[1].p_out_of_memory or 0) > 0.99 > 0.01 > (right[0].p_out_of_memory or 0)


def test_what_is_computed_again_is_left_open_only_where_it_is_not_said() -> None:
    """And is then the quickest that fits: not what would run out of memory, and no more than is needed."""
    large = {"mbs": "8", "tp": "4", "pp": "8", "dp": "16", "recompute": ""}
    assert validation.predict(row(**large | {"recompute": "none"})).refused
    assert len(validation.candidates(row(**large))) == len(validation.RECOMPUTED)
    assert len(validation.candidates(row(recompute="none"))) == 1
    assert not validation.predict(row(**large)).refused
    small, none = (validation.predict(row(mbs="1", recompute=said)) for said in ("", "none"))
    assert small.step_seconds == none.step_seconds


def test_what_is_not_known_has_what_all_share() -> None:
    unknown = software("somebody's own")
    assert unknown == software("somebody else's")
    assert unknown.gradients_hidden == Software().gradients_hidden
    for field in fitting.RESIDUALS:
        measured = [getattr(software(name), field) for name in ("Megatron-DeepSpeed", "AA-Scaling", OURS)]
        # Partial pooling: drawn to 1, and between those that were measured.
        assert min(*measured, 1.0) <= getattr(unknown, field) <= max(*measured, 1.0)
    assert spread("somebody's own") > max(spread(name) for name in ("Megatron-DeepSpeed", "AA-Scaling"))


def test_a_version_that_was_not_measured_has_its_own_facts_and_the_nearest_ones_residuals() -> None:
    measured, other = software("Megatron-LM 0.14 + TE"), software("Megatron-Core r0.8.0")
    assert other.blocks_overlap
    assert replace(other, blocks_overlap=False) == measured


def test_the_fit_finds_what_made_the_measurements() -> None:
    """Steps of two frameworks priced with known residuals; one of them ran on slow nodes, which bends nothing."""
    known = {
        "AA-Scaling": replace(FACTS["AA-Scaling"], compute=1.3, memory=1.5, network=1.5, step_seconds=0.05),
        "Megatron-DeepSpeed": replace(FACTS["Megatron-DeepSpeed"], compute=0.95, memory=1.2, launch=3.0),
    }
    step, device = row(framework="AA-Scaling", vpp="1").workload(), hardware("a100_80gb", 8)
    shapes = [replace(step, layout=Layout(tp=tp, pp=8, dp=64 // tp, sp=False)) for tp in (1, 2, 4, 8)]
    shapes += [replace(each, micro_batch=1) for each in shapes]
    shapes += [replace(each, layout=Layout(), global_batch=1, sequence_length=128) for each in shapes[-1:]]
    steps = {
        name: [(each, device, estimate_time(each, device, made).total) for each in shapes]
        for name, made in known.items()
    }
    slow, _, seconds = steps["AA-Scaling"][2]
    found = fitting.fit_residuals(steps | {"AA-Scaling": [*steps["AA-Scaling"], (slow, device, 2 * seconds)]})
    for name, measured in steps.items():
        assert np.abs(fitting.step_errors(measured, fitting.with_residuals(name, found[name]))).max() < 0.02


def test_what_says_nothing_stays_put() -> None:
    found = fitting.fit(
        lambda point: np.log(np.array([point["a"] / 2, point["a"] / 2])),
        {"a": 1.0, "b": 1.0, "c": 0.0},
        {"a": (0.1, 10.0), "b": (0.1, 10.0), "c": (0.0, 1.0)},
    )
    assert found["a"] == pytest.approx(2, rel=0.01)
    assert (found["b"], found["c"]) == (1.0, 0.0)


def test_bounds_hold() -> None:
    found = fitting.fit(lambda point: np.log(np.array([point["a"] / 20])), {"a": 1.0}, {"a": (0.1, 3.0)})
    assert found == {"a": 3.0}


def test_only_calibration_rows_are_fitted_on() -> None:
    rows = [row(split="calibrate"), row(split="validate"), row(split="calibrate", layers=""), row(framework="other")]
    assert len(fitting.calibration(rows, "Megatron-DeepSpeed")) == 1


def test_a_second_fit_is_the_first() -> None:
    operators: list[dict[str, Any]] = [
        {"hardware": "A100 PCIe", "op": "matmul", "efficiency": share, "shape": f"b=1, {shape}, accumulate=False"}
        for shape, share in (
            ("m=4096, k=7168, n=4096", "0.742"),
            ("m=4096, k=5120, n=576", "0.497"),
            ("m=24640, k=1536, n=5120", "0.703"),
        )
    ]
    once, twice = (fitting.fit_products(operators, "A100 PCIe") for _ in range(2))
    assert json.dumps(once) == json.dumps(twice)
    assert 0.7 < once["bf16_flops"] < 0.9


def test_overlapped_blocks_leave_a_chunk_to_wait_for() -> None:
    step: Workload = replace(row(vpp="1").workload(), layout=Layout(tp=8, pp=8, dp=8))
    device = hardware("h100", 8)
    alone = estimate_time(step, device, Software())
    beside = estimate_time(step, device, Software(blocks_overlap=True))
    assert beside.tensor == pytest.approx(alone.tensor / 8)


def test_a_table_of_steps_alone_is_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without what was measured, by whom, and for what."""
    table, out = tmp_path / "steps.csv", tmp_path / "predictions.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerow(row().cells)
    assert validation.main([str(table), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["-", "-", "1", "1"]
    assert "gpt" in out.read_text()


def test_a_table_that_is_none_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validation.main([str(tmp_path / "nowhere.csv")]) == 2
    assert "nowhere.csv: cannot be read" in capsys.readouterr().err
