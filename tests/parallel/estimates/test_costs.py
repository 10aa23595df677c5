"""The time estimate and the hardware profiles it reads."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

import pytest

from jobs.errors import InputError
from parallel.estimates import layers
from parallel.estimates.costs import VARIATION, TimeEstimate, estimate_time
from parallel.estimates.hardware import hardware
from parallel.estimates.network import Network
from parallel.estimates.software import Software
from parallel.estimates.workload import Workload
from parallel.layout import Layout


def estimate(make_job: Any, layout: dict[str, int], micro_batch: int = 1, **job: Any) -> TimeEstimate:
    made = make_job(**job)
    device = hardware(made.cluster.hardware, made.cluster.devices_per_node)
    return estimate_time(Workload.of(made, Layout(**layout), micro_batch), device)


@pytest.mark.parametrize(
    ("group", "measured_us"),
    [(8, 1265), (16, 5774), (32, 8059), (64, 9164)],
)
def test_all_to_all_as_measured(group: int, measured_us: float) -> None:
    """NCCL dispatch of 4096 tokens x 7168 x top-8 in bf16 on H100 nodes of 8 (arXiv 2603.07685, table 7)."""
    seconds = Network(hardware("h100", 8), 8).all_to_all(4096 * 7168 * 8 * 2, group, 1)
    assert seconds * 1e6 == pytest.approx(measured_us, rel=0.03)


def test_two_mixtral_layers_on_an_h200(make_job: Any) -> None:
    """62.4% of the peak was measured: forward and backward of two layers and the head, sequence 4096, batch 2.

    docs/benchmarks/layer-h200.json. Without residuals, arithmetic and memory traffic are a bound from above.
    """
    job = make_job("mixtral_8x7b", "h200_x8", model_changes={"layers": 2}, global_batch=2)
    time = estimate_time(Workload.of(job, Layout(), 2), hardware("h200", 8), Software())
    mfu = job.model.flops_per_token(4096) * 2 * 4096 / (time.total - time.optimizer) / 989.5e12
    assert 0.624 < mfu < 1.15 * 0.624


def test_a_ring_crosses_nodes_at_the_speed_of_the_ports_it_shares() -> None:
    network = Network(hardware("h100", 8), 8)
    size = 1e9
    inside = network.all_gather(size, 8, 1)
    alone_a_node = network.all_gather(size, 8, 8)  # eight groups, each with one rank a node: one port each
    whole_nodes = network.all_gather(size, 16, 1)  # one group with all ranks of two nodes: eight ports
    assert inside < alone_a_node
    assert whole_nodes < alone_a_node
    assert network.all_gather(size, 1, 1) == 0


def test_bubble_is_p_minus_1_over_m_of_the_work(make_job: Any) -> None:
    time = estimate(make_job, {"pp": 4}, model="llama3_8b", cluster="h100_x8", global_batch=16)
    work = time.compute + time.launch + time.tensor + time.expert + time.pipeline
    # The last stage has the head too: the others, for which it waits, are quicker.
    assert 0.7 * work * 3 / 16 < time.bubble < work * 3 / 16


@pytest.mark.parametrize(
    ("layout", "paid"),
    [
        ({}, set()),
        ({"tp": 2, "etp": 2}, {"tensor"}),
        ({"dp": 2}, {"data"}),  # in the open: nothing hides it yet
        ({"dp": 2, "ep": 2}, {"expert", "data"}),
        ({"pp": 2}, {"pipeline", "bubble"}),
        ({"dp": 2, "etp": 2}, {"tensor", "data"}),
        ({"cp": 2}, {"context", "data"}),
    ],
)
def test_each_axis_pays_for_itself_alone(make_job: Any, layout: dict[str, int], paid: set[str]) -> None:
    time = estimate(make_job, layout, model="mixtral_8x7b", cluster="h100_x8")
    assert {part.name for part in fields(time) if getattr(time, part.name) > 0} == paid | {
        "compute",
        "launch",
        "optimizer",
        "fixed",
    }
    assert sum(getattr(time, part.name) for part in fields(time)) == pytest.approx(time.total)


def test_work_shrinks_with_the_ranks_that_share_it(make_job: Any) -> None:
    def compute(**layout: int) -> float:
        # A small head: the loss of one that ranks share is more kernels than of a whole one.
        return estimate(make_job, layout, model="llama3_8b", cluster="h100_x8", model_changes={"vocab": 1024}).compute

    assert compute(tp=2) < compute()
    # Two devices are as fast as the slower one.
    slower = compute(dp=2) / (compute() / 2)
    assert 1 < slower < 1 + VARIATION
    assert compute(tp=2) == pytest.approx(slower * compute() / 2, rel=0.01)


def test_the_slowest_of_many_devices_makes_the_rest_wait(make_job: Any) -> None:
    def compute(devices: int) -> float:
        job = make_job("llama3_8b", "h100_x8", global_batch=devices)
        return estimate_time(Workload.of(job, Layout(dp=devices), 1), hardware("h100", 8), Software()).compute

    # 2.4 and 3.0 standard deviations above the mean: the expected maximum of 64 and of 512 (Tippett 1925).
    assert compute(64) / compute(1) - 1 == pytest.approx(2.38 * VARIATION, rel=0.02)
    assert compute(512) / compute(1) - 1 == pytest.approx(3.04 * VARIATION, rel=0.02)


def test_latents_of_attention_are_priced_as_what_they_are(make_job: Any) -> None:
    """DeepSeek-V2's attention of a layer: 4096 tokens, 128 heads (arXiv 2405.04434)."""
    job = make_job("deepseek_v3", "h100_x8")
    step, device = Workload.of(job, Layout(), 1), hardware("h100", 8)
    parts = layers.attention_parts(step, device, Network(device, 8), Software())
    model, tokens = job.model, step.tokens
    flops = tokens * model.attention_flops(step.sequence_length)
    seconds = sum(part.forward + part.backward for part in parts.values())
    assert 0.4 < flops / seconds / device.bf16_flops < 0.95
    again = estimate_time(replace(step, recompute=frozenset({"mla_up_proj"})), device)
    assert again.compute > estimate_time(step, device).compute


def test_virtual_stages_shorten_the_bubble_and_hide_what_they_send_but_while_they_fill(make_job: Any) -> None:
    plain, virtual = (
        estimate(make_job, {"pp": 4, "vpp": vpp}, model="llama3_8b", cluster="h100_x8", global_batch=16)
        for vpp in (1, 4)
    )
    # 2 (4 - 1) + (4 - 1) 4 = 18 of 16 x 4 sends are waited for; the plain schedule waits for its 16.
    assert virtual.pipeline == pytest.approx(plain.pipeline * 18 / 16)
    assert virtual.compute == plain.compute
    assert virtual.bubble < 0.3 * plain.bubble


def test_full_recomputation_is_a_forward_more(make_job: Any) -> None:
    job = make_job("mixtral_8x7b", "h100_x8")
    again = job.model_copy(update={"layout": job.layout.model_copy(update={"recompute": "full"})})
    layout, device = Layout(tp=2, dp=2, ep=4), hardware("h100", 8)
    once, twice = (estimate_time(Workload.of(each, layout, 1), device) for each in (job, again))
    # A third more, but for the head, which is not recomputed, and backward's kernels, which are slower than forward's.
    assert 1.25 * once.compute < twice.compute < 4 / 3 * once.compute
    assert twice.expert == pytest.approx(once.expert * 1.5)
    assert twice.data == once.data


def test_a_laptop_shares_its_memory_and_cores_among_its_ranks() -> None:
    one, many = hardware("laptop_cpu", 1), hardware("laptop_cpu", 64)
    assert one.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert many.memory_bytes == one.memory_bytes // 64
    assert many.fp32_flops <= one.fp32_flops
    assert one.peak_flops("fp32") is None


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match=r"^cluster.hardware=h10: unknown hardware; known: .*; nearest valid: h100$"):
        hardware("h10", 8)


def test_all_to_alls_beside_another_micro_batch_take_processors_from_it(make_job: Any) -> None:
    job = make_job("mixtral_8x7b", "h100_x8", global_batch=8)
    step, device = Workload.of(job, Layout(dp=8, ep=8), 1), hardware("h100", 8)
    alone, beside = (estimate_time(replace(step, experts_overlap=overlap), device) for overlap in (False, True))
    assert beside.expert == 0 < alone.expert
    assert beside.compute == pytest.approx(alone.compute + alone.expert * 24 / 132)
    assert beside.total < alone.total


def test_gradients_that_a_kernel_adds_to_their_sum(make_job: Any) -> None:
    """Each micro-batch, 10 bytes of each parameter of a rank: the bf16 gradient read, the fp32 sum read and written."""
    step = Workload.of(make_job("llama3_8b", "h200_x8"), Layout(tp=8), 1)
    device = hardware("h200", 8)
    fused, added = (estimate_time(step, device, Software(gradients_fused=each)) for each in (True, False))
    parameters = step.model.parameters / 8
    expected = step.micro_batches * 10 * parameters / device.memory_bytes_per_second
    assert added.compute - fused.compute == pytest.approx(expected, rel=0.03)  # the slowest of 8 is 2% slower
    assert added.total - fused.total == pytest.approx(expected, rel=0.03)
