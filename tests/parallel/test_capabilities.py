"""Each rule refuses what it should, with the numbers, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.errors import InputError
from parallel.capabilities import ATTENTION_RULES, EXPERT_RULES, check_job, refusal
from parallel.layout import Layout

RULES = ATTENTION_RULES + EXPERT_RULES


@pytest.mark.parametrize(
    ("model", "changes", "layout", "key", "reason"),
    [
        (
            "quickstart",
            {},
            {"cp": 2},
            "context parallelism",
            "cp=2: context parallelism is not available in the megatron",
        ),
        ("quickstart", {}, {"pp": 2, "vpp": 2}, "virtual stages", "vpp=2: the interleaved schedule is not available"),
        ("quickstart", {}, {"pp": 3}, "layers", "pp=3 does not divide layers=4"),
        ("quickstart", {}, {"tp": 3}, "heads", "tp=3 does not divide heads=4"),
        ("quickstart", {}, {"tp": 4}, "kv_heads", "tp=4 exceeds kv_heads=2, which are not replicated"),
        ("quickstart", {"heads": 12, "kv_heads": 3}, {"tp": 2}, "kv_heads", "tp=2 does not divide kv_heads=3"),
        ("quickstart", {"vocab": 257}, {"tp": 2}, "vocab", "tp=2 does not divide vocab=257"),
        ("llama3_8b", {"ffn": 14335}, {"tp": 2}, "ffn", "tp=2 does not divide ffn=14335"),
        (
            "quickstart",
            {"shared_expert_ffn": 129},
            {"tp": 2},
            "shared_expert_ffn",
            "tp=2 does not divide shared_expert_ffn=129",
        ),
        ("mixtral_8x7b", {}, {"dp": 16, "ep": 16}, "experts", "ep=16 does not divide experts=8"),
        ("quickstart", {"expert_ffn": 255}, {"dp": 4, "etp": 2}, "expert_ffn", "etp=2 does not divide expert_ffn=255"),
        ("llama3_8b", {}, {"dp": 2, "ep": 2}, "dense model", "ep=2, but llama3_8b has no experts"),
        ("quickstart", {}, {"dp": 5}, "global_batch", "dp=5 does not divide global_batch=32"),
    ],
)
def test_what_is_refused(
    make_job: Any, model: str, changes: dict[str, Any], layout: dict[str, int], key: str, reason: str
) -> None:
    refused = refusal(RULES, Layout(**layout), make_job(model, model_changes=changes))
    assert refused is not None
    assert refused[0].key == key
    assert refused[1].startswith(reason)


def test_sequence_parallelism_needs_tp_to_divide_the_sequence(make_job: Any) -> None:
    refused = refusal(RULES, Layout(tp=2, etp=2), make_job(sequence_length=33))
    assert refused is not None
    assert refused[1] == "tp=2 does not divide sequence_length=33"


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("quickstart", {"tp": 2, "dp": 2, "pp": 2, "ep": 4}),
        ("quickstart", {"tp": 2, "dp": 2, "etp": 2}),
        ("quickstart", {"tp": 2, "dp": 2}),  # experts replicated over tp
        ("quickstart", {"dp": 4, "etp": 2, "ep": 2}),
        ("quickstart", {"dp": 8}),
        ("llama3_8b", {"tp": 8, "pp": 4}),
        ("qwen2_57b_a14b", {"tp": 4, "dp": 16, "ep": 64}),
    ],
)
def test_what_runs(make_job: Any, model: str, layout: dict[str, int]) -> None:
    job = make_job(model)
    check_job(job)
    assert refusal(RULES, Layout(**layout), job) is None


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (
            {"engine": "deepspeed"},
            "engine=deepspeed: the deepspeed engine is not available yet; nearest valid: megatron",
        ),
        (
            {"model": "deepseek_v3", "model_changes": {"router_bias": False, "router_score": "softmax"}},
            "model.kv_lora_rank=512: no engine runs multi-latent attention yet; nearest valid: 0",
        ),
        (
            {"model_changes": {"router_bias": True}},
            "model.router_bias=True: the megatron engine does not balance experts by a router bias yet; "
            "use model.aux_loss; nearest valid: False",
        ),
        (
            {"model_changes": {"router_score": "sigmoid"}},
            "model.router_score=sigmoid: the megatron engine does not score experts by sigmoid yet; "
            "nearest valid: softmax",
        ),
    ],
)
def test_jobs_that_no_layout_helps(make_job: Any, job: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_job(make_job(**job))
    assert str(caught.value) == message
