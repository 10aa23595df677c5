"""Each rule refuses what it should, with the numbers, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.errors import InputError
from parallel.capabilities import ATTENTION_RULES, EXPERT_RULES, batch_refusal, check_job, refusal
from parallel.layout import Layout

RULES = ATTENTION_RULES + EXPERT_RULES


@pytest.mark.parametrize(
    ("model", "changes", "layout", "key", "reason"),
    [
        ("quickstart", {}, {"pp": 3}, "layers", "pp=3 does not divide layers=4"),
        ("quickstart", {}, {"pp": 2, "vpp": 4}, "layers", "pp*vpp=2*4=8 does not divide layers=4"),
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
    ("degrees", "refused_at", "runs_at", "reason"),
    [
        ({"cp": 3}, 63, 66, "2*cp=2*3=6 chunks, which balance causal attention, do not divide sequence_length=63"),
        ({"tp": 2, "etp": 2, "cp": 3}, 69, 66, "2*cp=2*3=6 chunks, which balance causal attention, do not divide"),
        ({"tp": 4, "cp": 3}, 66, 72, "tp*cp=4*3=12 does not divide sequence_length=66"),
    ],
)
def test_how_context_parallelism_divides_a_sequence(
    make_job: Any, degrees: dict[str, int], refused_at: int, runs_at: int, reason: str
) -> None:
    layout, model = Layout(**degrees), {"kv_heads": 4}
    refused = refusal(RULES, layout, make_job(sequence_length=refused_at, model_changes=model))
    assert refused is not None
    assert refused[1].startswith(reason)
    assert refusal(RULES, layout, make_job(sequence_length=runs_at, model_changes=model)) is None


def test_interleaved_stages_take_micro_batches_in_whole_groups(make_job: Any) -> None:
    layout = Layout(pp=4, vpp=2)
    refused = batch_refusal(layout, make_job(), 6)
    assert refused is not None
    assert refused[1] == "vpp=2 takes micro-batches in groups of pp=4: 6 a step are no multiple"
    assert batch_refusal(layout, make_job(), 8) is None
    assert batch_refusal(Layout(pp=4), make_job(), 6) is None


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("quickstart", {"tp": 2, "dp": 2, "pp": 2, "ep": 4}),
        ("quickstart", {"cp": 2}),
        ("quickstart", {"tp": 2, "cp": 2, "dp": 2, "pp": 2, "vpp": 2, "ep": 4}),
        ("llama3_8b", {"cp": 8, "pp": 4, "vpp": 8}),
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
            {"model": "deepseek_v3"},
            "model.kv_lora_rank=512: no engine runs multi-latent attention yet; nearest valid: 0",
        ),
        (
            {"model_changes": {"gated": False}},
            "model.gated=False: no engine runs a feed-forward block of two matrices and a GELU yet; nearest valid: "
            "True",
        ),
        (
            {"layout": {"dispatcher": "flex"}},
            "layout.dispatcher=flex: flex moves tokens by DeepEP, which runs on GPUs, and this job is for cpu; "
            "nearest valid: alltoall",
        ),
        (
            {"layout": {"context_attention": "ulysses"}},
            "layout.context_attention=ulysses: the megatron engine exchanges keys and values over cp, at once (gather) "
            "or in turn (ring), not heads; nearest valid: gather",
        ),
        (
            {"layout": {"dispatcher": "flex"}, "cluster": "h200_x8", "precision": "fp32"},
            "layout.dispatcher=flex: flex moves tokens by DeepEP, which takes them in bf16, and "
            "train.precision=fp32; nearest valid: alltoall",
        ),
        (
            {"layout": {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")}},
            "layout.recompute_modules=('core_attn', 'mlp'): mlp is of dense feed-forward layers, and quickstart has "
            "none; nearest valid: ('core_attn',)",
        ),
        (
            {"layout": {"zero_stage": 3}},
            "layout.zero_stage=3: the megatron engine shards the optimizer's state and nothing else; "
            "layout.optimizer_replicas says over how many ranks; nearest valid: 1",
        ),
        (
            {"layout": {"offload_optimizer": "cpu"}},
            "layout.offload_optimizer=cpu: the megatron engine keeps optimizer state on the device; "
            "nearest valid: none",
        ),
        (
            {"layout": {"offload_parameters": "nvme"}},
            "layout.offload_parameters=nvme: the megatron engine keeps weights on the device; nearest valid: none",
        ),
    ],
)
def test_jobs_that_no_layout_helps(make_job: Any, job: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_job(make_job(**job))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "job",
    [
        {"layout": {"dispatcher": "allgather"}},
        {"layout": {"dispatcher": "flex"}, "cluster": "h200_x8"},
        {"model": "llama3_8b", "layout": {"dispatcher": "flex", "recompute_modules": ("moe",)}},  # neither is asked for
        {"layout": {"recompute": "selective", "recompute_modules": ("core_attn", "layernorm", "moe")}},
        {"model": "llama3_8b", "layout": {"recompute": "selective", "recompute_modules": ("mlp",)}},
        {"model_changes": {"router_bias": True}},
        {"model_changes": {"router_bias": True, "router_score": "sigmoid", "router_normalize_top_k": False}},
        {"model_changes": {"capacity_factor": 1.25, "drop_order": "position"}},
    ],
)
def test_jobs_that_run(make_job: Any, job: dict[str, Any]) -> None:
    check_job(make_job(**job))


def test_optimizer_copies_divide_the_replicas_of_every_weight(make_job: Any) -> None:
    job = make_job(layout={"optimizer_replicas": 2})
    attention = refusal(
        RULES, Layout(tp=4, dp=3), make_job("llama3_8b", layout={"optimizer_replicas": 2}, global_batch=33)
    )
    assert attention is not None
    assert attention[1] == "optimizer_replicas=2 does not divide dp*cp=3"
    experts = refusal(RULES, Layout(dp=4, ep=4), job)
    assert experts is not None
    assert experts[1] == "optimizer_replicas=2 does not divide edp=1"
    assert refusal(RULES, Layout(dp=4, ep=2), job) is None


def test_flex_has_ranks_to_move_tokens_between(make_job: Any) -> None:
    job = make_job(cluster="h200_x8", layout={"dispatcher": "flex"})
    alone = refusal(RULES, Layout(dp=2), job)
    assert alone is not None
    assert alone[1] == "dispatcher=flex moves tokens between ranks, and etp*ep=1 leaves none to move"
    assert refusal(RULES, Layout(dp=2, ep=2), job) is None


DEEPSPEED_LAYOUTS = [
    ({}, {"tp": 2}, "etp=1: the deepspeed engine divides experts' widths over tp=2 as all others"),
    ({}, {"dp": 2, "etp": 2}, "etp=2: the deepspeed engine divides experts' widths over tp=1 as all others"),
    ({"zero_stage": 3}, {"tp": 2, "etp": 2}, None),
    ({}, {"tp": 2, "dp": 2, "pp": 2, "etp": 2, "ep": 2}, None),
    ({}, {"cp": 4}, "cp=4 does not divide kv_heads=2, which Ulysses gives out over cp"),
    ({}, {"tp": 2, "cp": 2, "etp": 2}, "tp*cp=2*2=4 does not divide kv_heads=2, which Ulysses gives out over cp"),
    ({"zero_stage": 3}, {"cp": 2, "dp": 2}, None),
    (
        {"zero_stage": 2},
        {"pp": 2},
        "pp=2: DeepSpeed's pipeline keeps gradients and weights whole; zero_stage=2, at most 1",
    ),
    ({"zero_stage": 1}, {"pp": 2, "cp": 2}, None),
    ({}, {"pp": 2, "vpp": 2}, "vpp=2: DeepSpeed's pipeline has no virtual stages"),
    (
        {"zero_stage": 3},
        {"dp": 2, "ep": 2},
        "ep=2: ZeRO-3 shards a weight over all of dp, and experts differ there; zero_stage=3",
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


def test_ulysses_divides_sequences(make_job: Any) -> None:
    for length, reason in ((4095, "cp=2 does not divide sequence_length=4095"), (4094, None)):
        refused = refusal(RULES, Layout(cp=2), make_job(engine="deepspeed", sequence_length=length))
        assert (refused and refused[1]) == reason


DEEPSPEED_JOBS = [
    ({"context_attention": "ring"}, "layout.context_attention=ring: the deepspeed engine exchanges heads over cp, not"),
    ({"context_attention": "ulysses"}, None),
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
    ({"zero_stage": 3, "offload_parameters": "nvme", "nvme_folder": "/fast"}, None),
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


def test_weights_go_to_nvme_in_bf16_alone(make_job: Any) -> None:
    layout = {"zero_stage": 3, "offload_parameters": "nvme", "nvme_folder": "/fast"}
    with pytest.raises(InputError) as caught:
        check_job(make_job(engine="deepspeed", layout=layout, precision="fp32"))
    assert "DeepSpeed reads weights back from nvme in 16 bits, train.precision=fp32" in str(caught.value)
    assert caught.value.nearest == "cpu"


def test_without_zero_fp32_gradients_add_up_in_fp32(make_job: Any) -> None:
    check_job(make_job(engine="deepspeed", layout={"zero_stage": 0}, precision="fp32"))
