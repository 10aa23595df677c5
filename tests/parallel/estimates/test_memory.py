"""The memory estimate: its parts, its shares, and published measurements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jobs.architecture import ModelArchitecture
from kernels.cross_entropy import CHUNK_ELEMENTS
from parallel.estimates.activations import routed_rows
from parallel.estimates.hardware import GIB, hardware
from parallel.estimates.memory import CHUNK_LOGITS, FITTED, MemoryEstimate
from parallel.estimates.memory import estimate_memory as estimate
from parallel.estimates.stages import stages
from parallel.estimates.workload import Workload
from parallel.layout import Layout


def estimate_memory(job: Any, layout: Layout, micro_batch: int) -> MemoryEstimate:
    device = hardware(job.cluster.hardware, job.cluster.devices_per_node)
    return estimate(Workload.of(job, layout, micro_batch), device)


# Largest allocated memory of a rank, GiB, of Megatron-LM 0.14 at sequence 4096, micro-batch 1, for cut-down models on
# 8 GPUs, as recorded by SimuMax (github.com/MooreThreads/SimuMax). One dense layer in the DeepSeek rows is inferred.
LLAMA_70B = ("llama3_70b", {"layers": 12})
LLAMA_405B = ("llama3_70b", {"layers": 4, "hidden": 16384, "heads": 128, "ffn": 53248})
DEEPSEEK_V3 = ("deepseek_v3", {"layers": 4, "first_dense_layers": 1})
DEEPSEEK_V2 = (
    "deepseek_v3",
    {"layers": 4, "first_dense_layers": 1, "hidden": 5120, "ffn": 12288, "vocab": 102400, "experts": 160, "top_k": 6}
    | {"expert_ffn": 1536, "shared_expert_ffn": 3072},
)
MEASURED = [
    (LLAMA_70B, {"pp": 2, "dp": 4}, 16, 66.55),
    (LLAMA_70B, {"tp": 2, "dp": 4}, 16, 60.68),
    (LLAMA_70B, {"tp": 4, "dp": 2}, 8, 39.07),
    (LLAMA_70B, {"tp": 8}, 4, 28.29),
    (LLAMA_405B, {"pp": 2, "dp": 4}, 16, 87.08),
    (LLAMA_405B, {"tp": 2, "dp": 4}, 16, 81.59),
    (LLAMA_405B, {"tp": 4, "dp": 2}, 8, 52.89),
    (LLAMA_405B, {"tp": 8}, 4, 38.57),
    (DEEPSEEK_V2, {"dp": 8, "ep": 8}, 32, 45.63),
    (DEEPSEEK_V2, {"pp": 2, "dp": 4, "ep": 4}, 16, 44.70),
    (DEEPSEEK_V3, {"dp": 8, "ep": 8}, 32, 104.3),
    (DEEPSEEK_V3, {"pp": 2, "dp": 4, "ep": 4}, 16, 114.0),
]


@pytest.mark.parametrize(("model", "layout", "global_batch", "measured"), MEASURED)
def test_published_measurements(
    make_job: Any, model: tuple[str, dict[str, int]], layout: dict[str, int], global_batch: int, measured: float
) -> None:
    job = make_job(model[0], "h200_x8", model_changes=model[1], global_batch=global_batch)
    step = replace(Workload.of(job, Layout(**layout), 1), activation_copies=0)
    memory = estimate(step, hardware("h200", 8))
    assert memory.allocated / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("name", ["quickstart", "qwen2_57b_a14b", "llama3_8b", "deepseek_v3", "qwen3_30b_a3b"])
@pytest.mark.parametrize("tied", [False, True])
def test_one_rank_holds_every_parameter(make_job: Any, name: str, tied: bool) -> None:
    model: ModelArchitecture = make_job(name, model_changes={"tied_embeddings": tied}).model
    (stage,) = stages(model, Layout())
    assert stage.dense_parameters + stage.expert_parameters == model.parameters


@pytest.mark.parametrize("tied", [False, True])
def test_stages_share_the_parameters(make_job: Any, tied: bool) -> None:
    """Over all ranks of tp, etp, ep and pp: every parameter once, but for what tensor parallelism replicates."""
    model: ModelArchitecture = make_job("qwen2_57b_a14b", model_changes={"tied_embeddings": tied}).model
    layout = Layout(tp=2, dp=4, pp=4, ep=8)
    held = sum(2 * stage.dense_parameters + 8 * stage.expert_parameters for stage in stages(model, layout))
    layer = model.attention_replicated_parameters + model.norm_parameters + model.router_parameters + model.hidden
    replicated = model.layers * layer + model.hidden
    second_table = model.embedding_parameters if tied else 0
    assert held == model.parameters + replicated + second_table


def test_leading_dense_layers_stand_on_the_first_stages(make_job: Any) -> None:
    model = make_job("deepseek_v3", model_changes={"layers": 8, "first_dense_layers": 3}).model
    found = [(stage.dense_layers, stage.moe_layers) for stage in stages(model, Layout(pp=4))]
    assert found == [(2, 0), (1, 1), (0, 2), (0, 2)]


@pytest.mark.parametrize(("precision", "weights", "optimizer"), [("bf16", 2, 12), ("fp32", 4, 8)])
def test_bytes_a_parameter(make_job: Any, precision: str, weights: int, optimizer: int) -> None:
    job = make_job("llama3_8b", "h100_x8", precision=precision)
    alone, shared = (estimate_memory(job, Layout(dp=dp), 1) for dp in (1, 8))
    parameters = job.model.parameters
    assert (alone.weights, alone.gradients, alone.optimizer) == tuple(parameters * n for n in (weights, 4, optimizer))
    assert (shared.weights, shared.gradients, shared.optimizer * 8) == (alone.weights, alone.gradients, alone.optimizer)


def test_experts_optimizer_state_is_shared_by_their_replicas_alone(make_job: Any) -> None:
    job = make_job("mixtral_8x7b", "h100_x8", global_batch=64)
    experts = job.model.layers * job.model.experts * job.model.expert_parameters
    dense = job.model.parameters - experts
    for ep, edp in ((1, 8), (4, 2), (8, 1)):
        memory = estimate_memory(job, Layout(dp=8, ep=ep), 1)
        assert memory.optimizer == pytest.approx(12 * (dense / 8 + experts / ep / edp))
        assert memory.weights == 2 * (dense + experts // ep)


def test_the_first_stage_holds_pp_micro_batches_at_most(make_job: Any) -> None:
    """1F1B: min(m, p) in flight, so activations stop growing with the number of micro-batches."""
    found = [
        estimate_memory(make_job("llama3_8b", "h100_x8", global_batch=batch), Layout(pp=4), 1).activations
        for batch in (1, 2, 4, 8)
    ]
    assert found[1] == 2 * found[0]
    assert found[2] == found[3] == 4 * found[0]


def test_virtual_stages_hold_more_micro_batches_and_deal_out_the_dense_layers(make_job: Any) -> None:
    """The first of p stages holds 1 + (p - 1) / (p v) times the activations of 1F1B (Korthikanti et al. 2022)."""
    job = make_job("llama3_8b", "h100_x8", global_batch=16)
    plain, virtual = (estimate_memory(job, Layout(pp=4, vpp=vpp), 1).activations for vpp in (1, 2))
    assert virtual == pytest.approx(plain * (1 + 3 / (4 * 2)))
    model = make_job("deepseek_v3", model_changes={"layers": 8, "first_dense_layers": 3}).model
    found = [(stage.dense_layers, stage.moe_layers) for stage in stages(model, Layout(pp=2, vpp=2))]
    assert found == [(2, 2), (1, 3)]


def test_full_recomputation_keeps_a_layers_input_alone(make_job: Any) -> None:
    job = make_job("llama3_8b", "h100_x8")
    again = job.model_copy(update={"layout": job.layout.model_copy(update={"recompute": "full"})})
    kept = estimate_memory(again, Layout(tp=2), 1)
    assert kept.activations == 32 * 4096 * 4096 * 2 // 2
    assert kept.total < estimate_memory(job, Layout(tp=2), 1).total


def test_sequence_parallelism_divides_all_activations(make_job: Any) -> None:
    job = make_job("llama3_8b", "h100_x8")
    whole, half, quarter = (estimate_memory(job, Layout(tp=tp), 1) for tp in (1, 2, 4))
    assert half.activations * 2 == whole.activations
    assert quarter.logits * 2 == half.logits


def test_a_head_by_chunks_holds_few_logits(make_job: Any) -> None:
    assert CHUNK_LOGITS == CHUNK_ELEMENTS
    step = Workload.of(make_job("llama3_8b", "h100_x8", model_changes={"vocab": 256_000}), Layout(), 1)
    assert step.own_kernels
    found = [estimate(replace(step, own_kernels=own), hardware("h100", 8)).logits for own in (True, False)]
    # The gradient of the head is more than a chunk of logits, and all logits are more than that.
    assert found == [6 * 256_000 * 4096, 8 * 256_000 * 4096]


def test_parts_sum_to_the_total(make_job: Any) -> None:
    memory = estimate_memory(make_job("mixtral_8x7b", "h100_x8"), Layout(tp=2, dp=2, pp=2, ep=4), 1)
    parts = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits]
    assert sum(parts) + memory.workspace + memory.update + memory.overhead == memory.total


def test_the_fullest_moment_is_the_optimizers_step_where_its_copies_exceed_what_backward_needs(make_job: Any) -> None:
    """Gradients in 16 bits are made fp32 when activations are gone: never both."""
    step = replace(Workload.of(make_job("llama3_8b", "h100_x8", sequence_length=128), Layout(), 1), gradient_bytes=2)
    device = hardware("h100", 8)
    alone = estimate(step, device)
    assert (alone.update, alone.activations, alone.workspace) == (4 * step.model.parameters, 0, 0)
    long = estimate(replace(step, sequence_length=65536), device)
    assert long.update == 0 < long.activations


def test_each_group_that_communicates_takes_memory(make_job: Any) -> None:
    job, reserve = make_job("llama3_8b", "h100_x8"), hardware("h100", 8).reserved_bytes

    def held(layout: Layout) -> float:
        memory = estimate_memory(job, layout, 1)
        return memory.overhead - FITTED["slack"] * (memory.activations + memory.workspace)

    found = [
        held(layout) / reserve for layout in (Layout(), Layout(dp=8), Layout(tp=2, dp=4), Layout(tp=2, pp=2, dp=2))
    ]
    assert found == pytest.approx([0.125, 0.3, 0.475, 0.65], abs=1e-3)


def test_a_fused_loss_keeps_nothing_beside_logits_and_a_whole_one_is_not_divided(make_job: Any) -> None:
    step = Workload.of(make_job("llama3_8b", "h100_x8", sequence_length=65536), Layout(tp=8), 1)
    device, logits = hardware("h100", 8), 65536 * step.model.vocab
    found = [estimate(replace(step, loss=loss), device).logits / logits for loss in ("parallel", "fused", "whole")]
    assert found == pytest.approx([8 / 8, 4 / 8, FITTED["whole_logit_bytes"]])


def test_written_scores_weigh_on_backward_too(make_job: Any) -> None:
    """With whole layers computed again, the block that is alive holds its scores, and their gradients."""
    job = make_job("llama3_8b", "h100_x8", sequence_length=8192, model_changes={"vocab": 1024})
    step = replace(Workload.of(job, Layout(), 1), recompute=frozenset({"layer"}))
    flash, unfused = (
        estimate(replace(step, attention_kernel=kernel), hardware("h100", 8)).workspace
        for kernel in ("flash", "unfused")
    )
    scores = 32 * 8192**2
    assert unfused - flash == pytest.approx((7 + 10) * scores, rel=0.01)


def test_each_zero_stage_shards_one_thing_more(make_job: Any) -> None:
    """Figure 1 of ZeRO (Rajbhandari et al. 2020), with gradients in fp32; offload leaves the device for the host."""
    layout, weights = Layout(dp=8), 8_030_261_248
    found = []
    for options in ({"zero_stage": stage} for stage in range(4)):
        memory = estimate_memory(make_job("llama3_8b", "h100_x8", options, engine="deepspeed"), layout, 1)
        found.append((memory.weights, memory.gradients, memory.optimizer))
    whole = (2 * weights, 4 * weights, 12 * weights)
    shard = tuple(each // 8 for each in whole)
    assert found == [whole, (*whole[:2], shard[2]), (whole[0], *shard[1:]), shard]
    away = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}
    memory = estimate_memory(make_job("llama3_8b", "h100_x8", away, engine="deepspeed"), layout, 1)
    assert (memory.weights, memory.gradients, memory.optimizer) == (0, shard[1], 0)
    here = estimate_memory(make_job("quickstart", "laptop", away, engine="deepspeed"), Layout(dp=2), 1)
    assert here.weights > 0


def test_layers_that_do_not_divide_leave_the_vocabulary_the_shorter_ends(make_job: Any) -> None:
    model: ModelArchitecture = make_job("deepseek_v3").model
    found = stages(model, Layout(dp=64, pp=4, vpp=4, ep=64))
    assert sum(stage.dense_layers for stage in found) == 3
    assert sum(stage.dense_layers + stage.moe_layers for stage in found) == 61


def test_deepseek_v3_on_256_gpus(make_job: Any) -> None:
    """PP4 VPP4 EP64, micro-batch 1: 36.4 GB of weights and gradients, 32.1 of optimizer, 131.0 of activations.

    From NVIDIA's report on Megatron-Core MoE, arXiv 2603.07685, whose activations are those of its own arrangement of
    stages with multi-token prediction; without that and with even stages 10% fewer are expected.
    """
    job = make_job("deepseek_v3", "h200_x8", global_batch=8192, nodes=32)
    given = Workload.of(job, Layout(dp=64, pp=4, vpp=4, ep=64), 1)
    balanced = replace(given, load="balanced", activation_copies=0, recompute=frozenset())
    memory = estimate(balanced, hardware("h200", 8))
    assert (memory.weights + memory.gradients) / GIB == pytest.approx(36.4, rel=0.02)
    assert memory.optimizer / GIB == pytest.approx(32.1, rel=0.02)
    assert memory.activations / GIB == pytest.approx(131.0, rel=0.12)


# LLaMA 13B on 64 A100 80 GB, sequences of 2,048, vocabulary of 128,000, sequence parallelism off (Hagemann et al. 2023,
# arXiv 2311.05610, raw sheets): tp, pp, micro-batch, whole layers recomputed, attention, a kernel for norms, ran out.
LLAMA_13B = [
    (1, 2, 1, False, "flash", False, False),
    (1, 1, 1, False, "flash", False, True),
    (1, 1, 2, False, "flash", True, True),
    (2, 1, 2, False, "flash", True, False),
    (2, 1, 4, False, "flash", False, True),
    (2, 2, 4, False, "flash", True, False),
    (2, 2, 8, False, "flash", True, True),
    (1, 2, 2, True, "fused_softmax", False, False),
    (1, 2, 1, False, "fused_softmax", False, True),
]


@pytest.mark.parametrize(("tp", "pp", "micro_batch", "full", "attention", "fused_norm", "ran_out"), LLAMA_13B)
def test_what_ran_out_of_memory(
    make_job: Any, tp: int, pp: int, micro_batch: int, full: bool, attention: Any, fused_norm: bool, ran_out: bool
) -> None:
    shape = {"layers": 40, "hidden": 5120, "heads": 40, "kv_heads": 40, "ffn": 13824, "vocab": 128_000}
    job = make_job("llama3_8b", model_changes=shape, sequence_length=2048, global_batch=2048)
    step = replace(
        Workload.of(job, Layout(tp=tp, pp=pp, dp=64 // tp // pp, sp=False), micro_batch),
        recompute=frozenset({"layer"} if full else ()),
        attention_kernel=attention,
        fused_norm=fused_norm,
        activation_copies=1,
        loss="whole",
        gradient_bytes=2,
    )
    device = hardware("a100_80gb", 8)
    assert (estimate(step, device).p_out_of_memory(device.memory_bytes) > 0.5) == ran_out


@pytest.mark.parametrize("module", ["layernorm", "moe_act", "moe", "shared_experts", "mlp", "mla_up_proj", "layer"])
def test_each_recomputed_module_is_not_kept(make_job: Any, module: str) -> None:
    step = Workload.of(make_job("deepseek_v3", "h200_x8", nodes=4), Layout(dp=32, ep=32), 1)
    device = hardware("h200", 8)
    kept = estimate(replace(step, recompute=frozenset()), device).activations
    assert estimate(replace(step, recompute=frozenset({module})), device).activations < kept


def test_two_matrices_keep_less_than_three(make_job: Any) -> None:
    gated, plain = (
        estimate_memory(make_job("llama3_8b", "h100_x8", model_changes={"gated": gated}), Layout(), 1).activations
        for gated in (True, False)
    )
    assert gated - plain == 32 * 2 * 4096 * 14336


def test_products_in_8_bits_keep_their_inputs_so(make_job: Any) -> None:
    step = replace(Workload.of(make_job("llama3_8b", "h100_x8"), Layout(), 1), activation_copies=0)
    bf16, fp8 = (estimate(replace(step, precision=given), hardware("h100", 8)).activations for given in ("bf16", "fp8"))
    # Two norms' outputs, and what the activation gives.
    assert bf16 - fp8 == 32 * 4096 * (2 * 4096 + 14336)


def test_without_sequence_parallelism_norms_are_whole_on_each_rank(make_job: Any) -> None:
    job = make_job("llama3_8b", "h100_x8")
    alone, shared = (estimate_memory(job, Layout(tp=2, sp=sp), 1).activations for sp in (False, True))
    assert alone - shared == 32 * 2 * 4096 * 4 * 4096 // 2


def test_the_probability_of_running_out_falls_with_the_device(make_job: Any) -> None:
    memory = estimate_memory(make_job("llama3_8b", "h100_x8"), Layout(tp=2, dp=4), 1)
    found = [memory.p_out_of_memory(memory.total + sigmas * memory.spread) for sigmas in (-2, 0, 2)]
    assert found == pytest.approx([0.97725, 0.5, 0.02275], abs=1e-4)


def test_a_capacity_factor_bounds_what_a_rank_receives(make_job: Any) -> None:
    step = Workload.of(make_job("mixtral_8x7b", "h100_x8"), Layout(dp=8, ep=8), 1)
    dropping = replace(step, model=step.model.model_copy(update={"capacity_factor": 1.0}))
    assert routed_rows(step) == pytest.approx(1.25 * routed_rows(dropping))
    assert routed_rows(dropping) == 2 * 4096
