"""The fit of the memory estimate's parameters to what ran and what ran out of memory."""

from __future__ import annotations

import json
from importlib.resources import files

from parallel.estimates import memory
from parallel.evidence.memory_fitting import fit, outcomes
from parallel.evidence.published import COLUMNS, Row

# LLaMA 13B on 64 A100 (arXiv 2311.05610, raw sheets): ran with 1 sequence a micro-batch, ran out of memory with 8.
LLAMA = dict.fromkeys(COLUMNS, "") | {
    "source_id": "sheet", "split": "calibrate", "model": "llama-13b", "arch": "dense-swiglu", "layers": "40",
    "hidden": "5120", "ffn": "13824", "heads": "40", "kv_heads": "40", "vocab": "128000", "seq_len": "2048",
    "gbs": "2048", "gpus": "64", "gpu_type": "A100-80GB-SXM", "gpus_per_node": "8", "precision": "bf16", "tp": "2",
    "pp": "2", "dp": "16", "zero_stage": "1", "sp": "no", "recompute": "none", "framework": "AA-Scaling",
    "attn_kernel": "flash_attention2",
}  # fmt: skip


def llama(micro_batch: str, status: str) -> Row:
    return Row(LLAMA | {"mbs": micro_batch, "status": status})


def test_what_says_nothing_of_memory_or_may_not_be_fitted_on_is_left_out() -> None:
    both = [llama("1", "ok"), llama("8", "oom")]
    silent = [llama("1", "kernel_unavailable"), llama("", "ok"), Row(LLAMA | {"mbs": "1", "status": "ok", "tp": "3"})]
    others = [
        Row(LLAMA | {"mbs": "1", "status": "ok", **changes})
        for changes in ({"split": "validate"}, {"source_id": "one"})
    ]
    assert [each.ran_out for each in outcomes([*both, *silent, *others])] == [False, True]


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
    assert late["slack"] < 0.3
    assert dict(memory.FITTED) == before
    assert json.loads((files("parallel.estimates") / "memory_fitted.json").read_text()) == before
