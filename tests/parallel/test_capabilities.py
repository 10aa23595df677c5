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


DEEPSPEED_LAYOUTS = [
    ({}, {"tp": 2}, "tp=2: tensor parallelism is not available in the deepspeed engine yet"),
    ({}, {"pp": 2}, "pp=2: the pipeline is not available in the deepspeed engine yet"),
    ({}, {"dp": 2, "etp": 2}, "etp=2: the deepspeed engine shards experts over ep, never within one"),
    (
        {"zero_stage": 3},
        {"dp": 2, "ep": 2},
        "ep=2: DeepSpeed keeps experts whole below ZeRO-3 only, zero_stage=3",
    ),
    ({"zero_stage": 2}, {"dp": 2, "ep": 2}, None),
    ({"zero_stage": 3}, {"dp": 8}, None),
]


@pytest.mark.parametrize(("options", "degrees", "reason"), DEEPSPEED_LAYOUTS)
def test_layouts_of_the_deepspeed_engine(
    make_job: Any, options: dict[str, Any], degrees: dict[str, int], reason: str | None
) -> None:
    refused = refusal(RULES, Layout(**degrees), make_job(engine="deepspeed", layout=options))
    assert (refused and refused[1]) == reason


DEEPSPEED_JOBS = [
    ({"dispatcher": "allgather"}, "layout.dispatcher=allgather: the deepspeed engine sends tokens to experts by an"),
    ({"recompute": "selective"}, "layout.recompute=selective: the deepspeed engine recomputes whole layers, or none"),
    ({"recompute": "full"}, None),
    ({"optimizer_replicas": 2}, "layout.optimizer_replicas=2: ZeRO shards over all data parallel ranks"),
    ({"zero_stage": 0}, "layout.zero_stage=0: without ZeRO, DeepSpeed adds micro-batches' gradients up in bf16"),
    (
        {"zero_stage": 2, "offload_optimizer": "nvme", "nvme_folder": "/fast"},
        "layout.offload_optimizer=nvme: wants zero_stage of at least 3, zero_stage=2",
    ),
    ({"zero_stage": 1, "offload_optimizer": "cpu"}, None),
    (
        {"zero_stage": 2, "offload_parameters": "cpu"},
        "layout.offload_parameters=cpu: wants zero_stage=3, zero_stage=2",
    ),
    ({"zero_stage": 3, "offload_parameters": "cpu"}, None),
    (
        {"zero_stage": 3, "offload_parameters": "nvme"},
        "layout.nvme_folder: offload to nvme needs a folder for its files, the same on every node",
    ),
    ({"zero_stage": 3, "offload_optimizer": "nvme", "nvme_folder": "/fast"}, None),
]


@pytest.mark.parametrize(("options", "message"), DEEPSPEED_JOBS)
def test_jobs_of_the_deepspeed_engine(make_job: Any, options: dict[str, Any], message: str | None) -> None:
    job = make_job(engine="deepspeed", layout=options)
    if message is None:
        check_job(job)
        return
    with pytest.raises(InputError) as caught:
        check_job(job)
    assert str(caught.value).startswith(message)


def test_without_zero_fp32_gradients_add_up_in_fp32(make_job: Any) -> None:
    check_job(make_job(engine="deepspeed", layout={"zero_stage": 0}, precision="fp32"))
