"""What a row of published measurements says of a training step, and what is said of one that says too little."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from jobs.errors import InputError
from parallel.evidence.published import COLUMNS, Row, UnpricedError, read

# arXiv 2311.05610, raw sheets: LLaMA 13B on 64 A100, and one of arXiv 2504.14960's, Mixtral 8x22B on 128 H100.
LLAMA = {
    "row_id": "llama", "model": "llama-13b", "arch": "dense-swiglu", "layers": "40", "hidden": "5120", "ffn": "13824",
    "heads": "40", "kv_heads": "40", "vocab": "128000", "seq_len": "2048", "gbs": "2048", "mbs": "2", "gpus": "64",
    "gpu_type": "A100-80GB-SXM", "gpus_per_node": "8", "precision": "bf16", "tp": "2", "pp": "2", "vpp": "1",
    "cp": "1", "ep": "1", "etp": "1", "dp": "16", "zero_stage": "1", "sp": "no", "recompute": "full (every layer)",
    "attn_kernel": "torch",
}  # fmt: skip
MIXTRAL = LLAMA | {
    "row_id": "mixtral", "model": "mixtral-8x22b", "arch": "moe-gqa", "layers": "56", "hidden": "6144", "ffn": "16384",
    "heads": "48", "kv_heads": "8", "vocab": "32000", "experts": "8", "topk": "2", "moe_ffn": "16384", "gbs": "256",
    "seq_len": "4096", "mbs": "", "gpus": "128", "tp": "2", "pp": "8", "ep": "8", "dp": "8", "sp": "yes",
    "recompute": "", "attn_kernel": "", "routing": "token-drop, capacity factor 1",
}  # fmt: skip


def row(cells: dict[str, str]) -> Row:
    return Row(dict.fromkeys(COLUMNS, "") | cells)


def test_a_dense_step() -> None:
    step = row(LLAMA).workload()
    assert (step.model.parameters / 1e9, step.layout.world) == (pytest.approx(13.9, rel=0.01), 64)
    assert (step.micro_batches, step.recompute, step.fused_attention) == (64, {"layer"}, False)
    assert not step.layout.sp
    assert step.shards == 16


def test_a_step_of_experts_with_its_micro_batch_left_open() -> None:
    with pytest.raises(UnpricedError, match="mbs is not published"):
        row(MIXTRAL).workload()
    step = row(MIXTRAL).workload(micro_batch=2)
    assert step.model.parameters / 1e9 == pytest.approx(141, rel=0.01)
    assert (step.model.capacity_factor, step.load, step.expert_shards) == (1.0, "balanced", 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": "hybrid linear-attention MoE"}, "a model of kind 'hybrid linear-attention MoE'"),
        ({"layers": ""}, "layers is not published"),
        ({"gpus": "32"}, "tp\\*cp\\*dp\\*pp=64 is not gpus=32"),
        ({"mbs": "3"}, "dp\\*mbs=16\\*3 does not divide gbs=2048"),
        ({"precision": "NVFP4"}, "products in four bits"),
        ({"recompute": "selective op"}, "torch's choice"),
    ],
)
def test_what_cannot_be_priced_says_why(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(UnpricedError, match=reason):
        row(LLAMA | changes).workload()


@pytest.mark.parametrize(
    ("sharding", "stage", "shards"),
    [("", 0, 16), ("1 (sharded in 8-GPU node)", 1, 8), ("1 (sharded in 4 ranks)", 1, 4), ("fsdp(3)", 3, 16)],
)
def test_sharding(sharding: str, stage: int, shards: int) -> None:
    step = row(LLAMA | {"zero_stage": sharding}).workload()
    assert (step.zero_stage, step.shards) == (stage, shards)


def test_a_file_is_read_or_all_its_missing_columns_are_named(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([LLAMA, MIXTRAL])
    assert [each.row_id for each in read(table)] == ["llama", "mixtral"]
    table.write_text("row_id,model\n1,gpt\n")
    with pytest.raises(InputError, match="lacks the columns arch, seq_len, gbs") as caught:
        list(read(table))
    assert "framework" in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        list(read(tmp_path / "nowhere.csv"))


@pytest.mark.parametrize(
    ("changes", "dispatcher"),
    [
        ({"dispatcher": "HybridEP"}, "flex"),
        ({"dispatcher": "alltoall (token)"}, "alltoall"),
        ({"model": "qwen3-235b-a22b", "gpu_type": "GB200 (NVL72)", "framework": "Megatron-Bridge"}, "flex"),
        ({"model": "qwen3-235b-a22b", "gpu_type": "H100-80GB-SXM", "framework": "Megatron-Bridge"}, "alltoall"),
    ],
)
def test_the_dispatcher_is_what_the_row_or_its_recipe_says(changes: dict[str, str], dispatcher: str) -> None:
    assert row(MIXTRAL | changes).workload(1).dispatcher == dispatcher


def test_where_a_benchmark_says_nothing_of_routing_it_is_forced() -> None:
    bridge = row(MIXTRAL | {"routing": "", "framework": "Megatron-Core / Megatron-Bridge", "notes": "overlap on"})
    assert (bridge.workload(1).load, bridge.workload(1).experts_overlap) == ("balanced", True)
    assert row(MIXTRAL | {"routing": ""}).workload(1).load == "natural"
