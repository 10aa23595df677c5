"""Seconds of the operators of one rank, one by one: matrix products by shape, attention, kernels that move memory.

An operator takes the longer of its arithmetic and its memory traffic, and no less than the shortest kernel
(roofline, Williams et al. 2009). A product is dealt to the processors in tiles: the last wave may be part empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from parallel.estimates.hardware import Hardware
from parallel.estimates.workload import AttentionKernel, Precision

GROUPED_STREAMS = 4
"""Over which Transformer Engine deals the products of a group."""


UNEQUAL_HEADS = (0.94, 0.80)
"""Rate of attention with heads of 192 and values of 128, as in multi-latent attention, over that with heads of 128,
forward and backward: mean of A100 and B200, 64 heads, sequence 4096 (SimuMax's operator tables)."""


@dataclass(frozen=True)
class Seconds:
    """Of an operator or of several: what the device computes, and the kernels that the host starts for it."""

    forward: float = 0.0
    backward: float = 0.0
    kernels: int = 0
    """Forward; backward starts twice as many."""

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward + other.forward, self.backward + other.backward, self.kernels + other.kernels)

    def times(self, number: float) -> Seconds:
        return Seconds(self.forward * number, self.backward * number, round(self.kernels * number))


@lru_cache(maxsize=1 << 18)
def product(
    hardware: Hardware, precision: Precision, m: int, n: int, k: int, groups: int = 1, kernels: int = 1
) -> float:
    """`groups` products [m, k] x [k, n], as batches of one or several kernels.

    Of several, GROUPED_STREAMS run at once, and the host starts one after another: so Transformer Engine's grouped
    products do (its multi_stream_cublas_gemm).
    """
    flops = 2.0 * groups * m * n * k
    together = groups // kernels * min(kernels, GROUPED_STREAMS)
    element = {"fp32": 4, "fp8": 1}.get(precision, 2)
    rate = hardware.product_flops(precision) * k / (k + hardware.half_depth)
    if hardware.processors > 1:
        rate *= max(
            share * _filled(hardware.processors, m, n, together, rows, columns)
            for rows, columns, share in (
                (256, 128, 1.0),
                (128, 256, 1.0),
                (128, 128, hardware.tile_128),
                (128, 64, hardware.tile_64),
                (64, 128, hardware.tile_64),
            )
        )
    moved = groups * (element * (m * k + k * n) + 2 * m * n) / hardware.memory_bytes_per_second
    least = hardware.kernel_seconds if kernels == 1 else kernels * hardware.launch_seconds
    return max(flops / rate, moved, least)


def _filled(processors: int, m: int, n: int, groups: int, rows: int, columns: int) -> float:
    """Share of the processors' tiles that are results."""
    tiles = groups * ceil(m / rows) * ceil(n / columns)
    return groups * m * n / (ceil(tiles / processors) * processors * rows * columns)


def linear(hardware: Hardware, precision: Precision, tokens: int, out: int, inner: int, groups: int = 1) -> Seconds:
    """Forward [tokens, inner] x [inner, out]; backward its two gradients, the weights' added to a sum in fp32.

    Of `groups`, each is a kernel.
    """
    forward = product(hardware, precision, tokens, out, inner, groups, groups)
    inputs = product(hardware, precision, tokens, inner, out, groups, groups)
    weights = product(hardware, precision, inner, out, tokens, groups, groups)
    # The sum is read and written: 8 bytes an element.
    added = max(weights / hardware.accumulate, 8.0 * groups * inner * out / hardware.memory_bytes_per_second)
    kernels = 1 if precision != "fp8" else 3  # casts and transposes
    cast = 0.0
    if precision == "fp8":
        cast = 4.0 * groups * (tokens * inner + inner * out) / hardware.memory_bytes_per_second
    return Seconds(forward + cast, inputs + added + cast, kernels)


def moved(hardware: Hardware, elements: float, passes: float, kernels: int, element: int = 2) -> Seconds:
    """Kernels that read and write `elements` in all `passes` times; their backward half as much again."""
    seconds = passes * element * elements / hardware.memory_bytes_per_second
    least = kernels * hardware.kernel_seconds
    return Seconds(max(seconds, least), max(1.5 * seconds, 1.5 * least), kernels)


def attention(
    hardware: Hardware,
    precision: Precision,
    kernel: AttentionKernel,
    sequences: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    value_dim: int | None = None,
) -> Seconds:
    """Scores and their product with the values, causal: of queries [queries] against keys [keys] of each sequence.

    Heads of values are [value_dim], or as wide as those of queries and keys, [head_dim].

    flash: the profile's rate on the causal half; backward makes 2.5 times the products. flash1: the first kernel
    reaches 58% of the second's rate forward and 48% backward (Dao 2023, figures 4 and 5, A100). The others write scores
    and probabilities, whole: fused_softmax scales, masks and normalises in one kernel and drops in another,
    unfused does each alone. The one kernel takes four rows of scores at once: where heads times sequences are no
    multiple of four, Megatron-LM goes back to the others (its fused_softmax.py, is_kernel_available).
    """
    if kernel == "fused_softmax" and sequences * heads % 4:
        kernel = "unfused"
    width = (head_dim + (value_dim or head_dim)) / 2
    flops = 4.0 * sequences * queries * keys * heads * width
    few = sequences * heads * ceil(queries / 128) / hardware.processors
    filled = min(1.0, few / ceil(few)) if hardware.processors > 1 else 1.0
    if kernel in ("flash", "flash1"):
        slow_forward, slow_backward = (0.58, 0.48) if kernel == "flash1" else (1.0, 1.0)
        wide = min(1.0, head_dim / 128) ** 0.25
        if head_dim > 128:
            slow_forward, slow_backward = UNEQUAL_HEADS
        fp32 = hardware.fp32_flops / hardware.bf16_flops if precision == "fp32" else 1.0
        forward = flops / 2 / (hardware.attention_forward_flops * fp32 * filled * wide * slow_forward)
        backward = 1.25 * flops / (hardware.attention_backward_flops * fp32 * filled * wide * slow_backward)
        return Seconds(max(forward, hardware.kernel_seconds), max(backward, 2 * hardware.kernel_seconds), 1)
    kind: Precision = "fp32" if precision == "fp32" else "bf16"
    one = product(hardware, kind, queries, keys, head_dim, sequences * heads)
    other = product(hardware, kind, queries, head_dim, keys, sequences * heads)
    scores = float(sequences) * heads * queries * keys
    passes, kernels = (5.0, 3) if kernel == "fused_softmax" else (17.0, 7)
    return Seconds(one + other, 2 * (one + other), 2) + moved(hardware, scores, passes, kernels)
