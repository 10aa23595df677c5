"""What shape costs an operator, and what the profile's numbers are fitted on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.errors import InputError
from parallel.estimates.hardware import hardware, profile_names, read_profile
from parallel.estimates.operators import attention, linear, moved, product

ROOT = Path(__file__).parents[3]
A100 = hardware("a100_80gb", 8)


@pytest.mark.parametrize(
    ("m", "k", "n", "share"),
    [
        (4096, 7168, 4096, 0.742),
        (4096, 5120, 12288, 0.740),
        (4096, 7168, 18432, 0.757),
        (4096, 32128, 4096, 0.733),
        (4096, 1536, 4096, 0.746),
        (4096, 6144, 4096, 0.741),
        (4096, 5120, 576, 0.497),
        (24640, 1536, 5120, 0.703),
    ],
)
def test_products_as_measured(m: int, k: int, n: int, share: float) -> None:
    """Shares of 312 TFLOP/s on an A100, bf16 (SimuMax at 4dcaae51, configs/system/a100_pcie.json)."""
    assert 2 * m * n * k / product(A100, "bf16", m, n, k) / 312e12 == pytest.approx(share, rel=0.1)


def test_a_tile_more_than_the_processors_hold_costs_a_wave() -> None:
    full = product(A100, "bf16", 256 * 108, 128, 4096)
    one_more = product(A100, "bf16", 256 * 109, 128, 4096)
    assert one_more > 1.2 * full


def test_small_products_take_no_less_than_a_kernel() -> None:
    assert product(A100, "bf16", 8, 8, 8) == A100.kernel_seconds


def test_thin_products_are_bound_by_memory() -> None:
    assert product(A100, "bf16", 1, 16384, 16384) >= 2 * 16384**2 / A100.memory_bytes_per_second


def test_groups_share_the_device() -> None:
    whole = product(A100, "bf16", 4096, 4096, 4096)
    assert product(A100, "bf16", 512, 4096, 4096, groups=8) == pytest.approx(whole, rel=0.1)
    assert product(A100, "bf16", 16, 4096, 4096, groups=256) > 3 * whole


@pytest.mark.parametrize(
    ("groups", "m", "n", "k", "share"),
    [
        (160, 154, 3072, 5120, 0.200),
        (160, 154, 5120, 1536, 0.116),
        (80, 308, 3072, 5120, 0.387),
        (40, 2460, 3072, 5120, 0.609),
    ],
)
def test_grouped_products_as_measured(groups: int, m: int, n: int, k: int, share: float) -> None:
    """Shares of 2,250 TFLOP/s on a B200, each group a kernel (SimuMax at 4dcaae51, b200_bf16_ceperm.json).

    Of its 40 forward shapes the mean error is 14%; of 256 experts with 128 rows each it is 44%.
    """
    seconds = product(hardware("b200", 8), "bf16", m, n, k, groups, groups)
    assert 2 * groups * m * n * k / seconds / 2250e12 == pytest.approx(share, rel=0.3)


def test_weight_gradients_are_added_in_fp32() -> None:
    made = linear(A100, "bf16", 4096, 4096, 4096)
    assert 2 * made.forward < made.backward < 2.2 * made.forward


@pytest.mark.parametrize(("heads", "forward", "backward"), [(64, 1.187, 1.005), (32, 1.132, 0.976)])
def test_attention_as_measured(heads: int, forward: float, backward: float) -> None:
    """Shares of 312 TFLOP/s on an A100, sequence 4096, heads of 128; the table counts the whole of causal scores."""
    made = attention(A100, "bf16", "flash", 1, 4096, 4096, heads, 128)
    flops = 4.0 * 4096**2 * heads * 128
    assert flops / made.forward / 312e12 == pytest.approx(forward, rel=0.1)
    assert 2.5 * flops / made.backward / 312e12 == pytest.approx(backward, rel=0.1)


def test_kernels_that_write_scores_are_slower_the_less_is_fused() -> None:
    seconds = [
        attention(A100, "bf16", kernel, 1, 2048, 2048, 32, 128).forward
        for kernel in ("flash", "flash1", "fused_softmax", "unfused")
    ]
    assert seconds == sorted(seconds)
    assert seconds[-1] > 5 * seconds[0]


def test_what_only_moves_memory_follows_its_bytes() -> None:
    one = moved(A100, 2**26, 2, 1)
    assert one.forward == pytest.approx(2**26 * 2 * 2 / A100.memory_bytes_per_second)
    assert moved(A100, 1, 2, 3).forward == 3 * A100.kernel_seconds


@pytest.mark.parametrize("name", profile_names())
def test_every_number_of_a_profile_has_its_source(name: str) -> None:
    path = ROOT / "parallel" / "estimates" / "profiles" / f"{name}.json"
    given = json.loads(path.read_text(encoding="utf-8"))
    assert read_profile(json.dumps(given), name).name == name
    assert all(field["source"] for key, field in given.items() if key != "name")


def test_the_devices_that_are_shipped() -> None:
    devices = "a100_40gb a100_80gb ascend_910b b200 gb200_nvl72 h100 h200 laptop_cpu v100"
    assert profile_names() == tuple(devices.split())


def test_all_that_a_profile_lacks_is_named_at_once() -> None:
    path = ROOT / "parallel" / "estimates" / "profiles" / "h100.json"
    given = json.loads(path.read_text(encoding="utf-8"))
    del given["processors"], given["memory_bytes"], given["host_link"]["source"]
    with pytest.raises(InputError, match=r"^mine.json: lacks memory_bytes, processors, host_link.source$"):
        read_profile(json.dumps(given), "mine.json")
    with pytest.raises(InputError, match="is no JSON"):
        read_profile("{", "mine.json")


def test_profiles_hold_what_was_fitted() -> None:
    fitted = json.loads((ROOT / "parallel" / "estimates" / "fitted.json").read_text(encoding="utf-8"))["products"]
    assert fitted
    for name, numbers in fitted.items():
        device = hardware(name, 8)
        peak = device.peak_bf16_flops
        assert peak is not None
        assert replace(device, **{**numbers, "bf16_flops": numbers["bf16_flops"] * peak}).bf16_flops == pytest.approx(
            device.bf16_flops
        )
        assert {key: getattr(device, key) for key in numbers if key != "bf16_flops"} == {
            key: value for key, value in numbers.items() if key != "bf16_flops"
        }
