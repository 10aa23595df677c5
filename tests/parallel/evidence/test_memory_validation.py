"""Memory predicted beside measured: what counts as right, missed and refused, and the fit that comes out of a table."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from parallel.estimates import memory
from parallel.evidence.memory_fitting import fit
from parallel.evidence.memory_validation import accuracy, outcomes, summary
from parallel.evidence.published import COLUMNS, Row

# LLaMA 13B on 64 A100 (arXiv 2311.05610, raw sheets): ran with 1 sequence a micro-batch, ran out of memory with 8.
LLAMA = dict.fromkeys(COLUMNS, "") | {
    "source_id": "sheet", "split": "calibrate", "model": "llama-13b", "arch": "dense-swiglu", "layers": "40",
    "hidden": "5120", "ffn": "13824", "heads": "40", "kv_heads": "40", "vocab": "128000", "seq_len": "2048",
    "gbs": "2048", "gpus": "64", "gpu_type": "A100-80GB-SXM", "gpus_per_node": "8", "precision": "bf16", "tp": "2",
    "pp": "2", "dp": "16", "zero_stage": "1", "sp": "no", "recompute": "none", "framework": "AA-Scaling",
    "attn_kernel": "flash_attention2",
}  # fmt: skip
# SimuMax (github.com/MooreThreads/SimuMax): 4 layers of DeepSeek-V2 on 8 B200, largest allocated GiB.
DEEPSEEK = LLAMA | {
    "source_id": "simumax", "model": "deepseekv2-4layers", "arch": "moe-mla", "layers": "4", "hidden": "5120",
    "ffn": "12288", "heads": "128", "kv_heads": "", "vocab": "102400", "experts": "160", "topk": "6",
    "moe_ffn": "1536", "shared_experts": "2", "seq_len": "4096", "gbs": "32", "mbs": "1", "gpus": "8",
    "gpu_type": "B200-180GB", "tp": "1", "pp": "1", "dp": "8", "ep": "8", "sp": "", "routing": "forced balance",
    "framework": "Megatron-LM 0.14 + TE", "mem_gb": "45.63", "status": "ok", "attn_kernel": "",
}  # fmt: skip


def llama(micro_batch: str, status: str) -> Row:
    return Row(LLAMA | {"mbs": micro_batch, "status": status})


def test_outcomes_right_missed_and_refused() -> None:
    right = outcomes([llama("1", "ok"), llama("8", "oom")])
    assert [each.ran_out for each in right] == [False, True]
    assert accuracy(right) == (1, 0, 0)
    assert accuracy(outcomes([llama("8", "ok"), llama("1", "oom"), llama("1", "ok"), llama("8", "oom")])) == (
        0.5,
        0.5,
        0.5,
    )


def test_what_says_nothing_of_memory_is_left_out() -> None:
    assert outcomes([llama("1", "kernel_unavailable"), llama("", "ok"), Row(LLAMA | {"mbs": "1", "tp": "3"})]) == []


def test_an_amount_of_latent_attention_and_experts() -> None:
    (found,) = outcomes([Row(DEEPSEEK)])
    assert found.error == pytest.approx(0, abs=0.03)
    assert summary([found])[1].split()[:3] == ["simumax", "calibrate", "1"]


def test_the_fit_moves_to_where_outcomes_are() -> None:
    before = dict(memory.FITTED)
    late, early = (
        fit(outcomes([llama(*each) for each in rows]))
        for rows in (
            [("1", "ok"), ("2", "ok"), ("4", "ok"), ("8", "oom")],
            [("1", "ok"), ("2", "ok"), ("4", "oom"), ("8", "oom")],
        )
    )
    assert late["slack"] <= early["slack"]
    assert late["spread"] < 0.3
    assert dict(memory.FITTED) == before
    assert json.loads((files("parallel.estimates") / "memory_fitted.json").read_text()) == before
