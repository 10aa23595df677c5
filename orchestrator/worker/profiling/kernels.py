"""What one device computes: products, attention, copies, and the least that a kernel takes. Run on one rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.worker.profiling.timing import Call, sample, tell, timed

PRODUCTS_GPU = (
    *((8192, 8192, 8192), (4096, 4096, 4096), (4096, 14336, 4096), (4096, 4096, 14336), (8192, 6144, 4096)),
    *((8192, 4096, 2048), (4096, 4096, 1024), (4096, 4096, 512), (8192, 8192, 512), (8192, 8192, 256)),
    *((2048, 4096, 4096), (2048, 2048, 4096), (1024, 4096, 4096), (1024, 2048, 8192), (1024, 1024, 8192)),
    *((512, 4096, 4096), (256, 8192, 4096), (4096, 1536, 4096), (4096, 576, 5120), (2560, 5120, 5120)),
    *((4352, 4096, 4096), (3072, 9216, 3072), (16384, 2048, 1408), (8192, 1024, 2816)),
)
"""[m, k] x [k, n] as m, n, k: as layers have them, some that fill the processors badly, some of little depth."""
PRODUCTS_CPU = (
    *((1024, 1024, 1024), (512, 512, 512), (512, 128, 512), (512, 512, 128), (512, 512, 64)),
    *((1024, 384, 128), (2048, 256, 64), (256, 1024, 256), (128, 128, 2048)),
)
OTHER_PRODUCTS = {"cuda": ((8192, 8192, 8192), (4096, 4096, 4096)), "cpu": ((512, 128, 512), (256, 256, 256))}
"""Of precisions beside the main one: how they depend on shape is taken from it."""
ACCUMULATED = ((4096, 4096, 4096), (4096, 14336, 4096), (8192, 6144, 4096))
"""Products that add to a sum in fp32; each is among PRODUCTS_GPU too."""
GROUPED = {
    "cuda": ((8, 1024, 14336, 4096), (8, 2048, 4096, 7168), (32, 512, 1536, 2048), (64, 256, 2816, 2048)),
    "cpu": ((4, 128, 256, 128), (8, 64, 256, 128)),
}
"""Groups, and the sizes of one."""
ATTENTION = {
    "cuda": ((1, 4096, 32, 128), (2, 4096, 16, 128), (1, 8192, 16, 128)),
    "cpu": ((1, 512, 4, 64), (4, 256, 4, 32)),
}
"""Sequences, their length, heads, their width."""


class Kernels:
    """Measures of one device; each shares its seconds among its shapes, and leaves out what memory does not hold."""

    def __init__(self, device: torch.device, free_bytes: int) -> None:
        self.device, self.limit = device, free_bytes // 4
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self._apart = 2 * cache
        """Bytes between two uses of the same memory, so that none is found in the cache."""
        self.main = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.precision = "bf16" if device.type == "cuda" else "fp32"
        self._warm = [self._random(4096, 4096) for _ in range(3)] if device.type == "cuda" else []

    @property
    def all(self) -> dict[str, tuple[float, Callable[[float], None]]]:
        """Each measure with its share of the time."""
        found = {
            "memory": (1.0, self.memory),
            "launches": (1.0, self.launches),
            "products": (4.0, self.products),
            "other precisions": (2.0, self.other_products),
            "grouped products": (2.0, self.grouped),
            "attention": (2.0, self.attention),
        }
        if self.device.type == "cuda":
            found |= {"kernels": (0.5, self.kernels), "sums": (1.0, self.accumulated), "fp8": (1.0, self.fp8)}
        return found

    def memory(self, seconds: float) -> None:
        """A kernel that reads and writes."""
        elements = min(self.limit // 2, 2**31 if self.device.type == "cuda" else 2**27) // self.main.itemsize
        source = torch.ones(elements, dtype=self.main, device=self.device)
        call = partial(torch.add, source, 1, out=torch.empty_like(source))
        sample("copy", self._timed([call], seconds), bytes=2 * elements * self.main.itemsize)

    def kernels(self, seconds: float) -> None:
        """One of the smallest after another."""
        small = torch.zeros(1024, device=self.device)
        sample("kernel", self._timed([lambda: small.add_(1.0)], seconds))

    def launches(self, seconds: float) -> None:
        """Operations of a layer on tensors so small that the host's part is all there is, recorded for backward."""
        width, rounds = 16, 20
        inputs, weight = (torch.randn(width, width, device=self.device, requires_grad=True) for _ in range(2))
        norm = nn.Parameter(torch.ones(width, device=self.device))

        def operations() -> None:
            x = inputs
            for _ in range(rounds):
                x = functional.gelu(functional.linear(functional.layer_norm(x, (width,), norm), weight)) + x

        operations()
        found: list[float] = []
        until = time.perf_counter() + seconds
        while len(found) < 5 or time.perf_counter() < until:
            self._wait()
            start = time.perf_counter()
            operations()
            found.append((time.perf_counter() - start) / (4 * rounds))
        sample("launch", sorted(found)[len(found) // 2])

    def products(self, seconds: float) -> None:
        self._products(PRODUCTS_GPU if self.device.type == "cuda" else PRODUCTS_CPU, self.main, self.precision, seconds)

    def other_products(self, seconds: float) -> None:
        other, precision = (torch.float32, "fp32") if self.device.type == "cuda" else (torch.bfloat16, "bf16")
        self._products(OTHER_PRODUCTS[self.device.type], other, precision, seconds)

    def accumulated(self, seconds: float) -> None:
        """A weight's gradient in 16 bits, added to a sum in fp32 by the product itself."""

        def calls(groups: int, m: int, n: int, k: int) -> Call:
            a, b = self._random(m, k), self._random(k, n)
            total = torch.zeros(m, n, device=self.device)
            return lambda: torch.addmm(total, a, b, out_dtype=torch.float32, out=total)

        self._each("accumulated", "bf16", 2, calls, [(1, *shape) for shape in ACCUMULATED], seconds)

    def fp8(self, seconds: float) -> None:
        """Each operand scaled as a whole."""
        one = torch.ones((), device=self.device)

        def calls(groups: int, m: int, n: int, k: int) -> Call:
            a, b = (self._random(rows, k).to(torch.float8_e4m3fn) for rows in (m, n))
            return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        self._each("product", "fp8", 1, calls, [(1, *shape) for shape in OTHER_PRODUCTS["cuda"]], seconds)

    def grouped(self, seconds: float) -> None:
        """Groups of equal size: in one kernel where torch has it, else one after another."""

        def calls(groups: int, m: int, n: int, k: int) -> Call:
            rows, weights = self._random(groups * m, k), self._random(groups, n, k).transpose(1, 2)
            if self.device.type == "cuda":
                ends = torch.arange(m, groups * m + 1, m, dtype=torch.int32, device=self.device)
                return lambda: torch._grouped_mm(rows, weights, offs=ends)
            parts = rows.view(groups, m, k)
            return lambda: [part @ weight for part, weight in zip(parts, weights, strict=True)]

        self._each("product", self.precision, self.main.itemsize, calls, GROUPED[self.device.type], seconds)

    def attention(self, seconds: float) -> None:
        """Causal, by the kernel that torch chooses for the engines too."""
        shapes = ATTENTION[self.device.type]
        for sequences, length, heads, width in shapes:
            inputs = [self._random(sequences, heads, length, width).requires_grad_() for _ in range(3)]
            forward = partial(functional.scaled_dot_product_attention, *inputs, is_causal=True)
            out = forward()
            backward = partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True)
            sizes = {"sequences": sequences, "length": length, "heads": heads, "width": width}
            for what, call in (("attention", forward), ("attention_backward", backward)):
                sample(what, self._timed([call], seconds / len(shapes) / 2), self.precision, **sizes)

    def _products(
        self, shapes: Sequence[tuple[int, int, int]], kind: torch.dtype, precision: str, seconds: float
    ) -> None:
        def calls(groups: int, m: int, n: int, k: int) -> Call:
            return partial(functional.linear, self._random(m, k, kind=kind), self._random(n, k, kind=kind))

        self._each("product", precision, kind.itemsize, calls, [(1, *shape) for shape in shapes], seconds)

    def _each(
        self,
        what: str,
        precision: str,
        element: int,
        calls: Callable[[int, int, int, int], Call],
        shapes: Sequence[tuple[int, int, int, int]],
        seconds: float,
    ) -> None:
        """Of groups of products m x k by k x n, each on as many copies as keep the next one out of the cache."""
        for groups, m, n, k in shapes:
            size = groups * (element * (m * k + k * n) + 4 * m * n)
            copies = max(1, math.ceil(self._apart / size))
            if copies * size <= self.limit:
                made = [calls(groups, m, n, k) for _ in range(copies)]
                taken = self._timed(made, seconds / len(shapes))
                sample(what, taken, precision, m=m, n=n, k=k, groups=groups)

    def _timed(self, calls: Sequence[Call], seconds: float) -> float:
        return timed(self.device, calls, seconds, self._work)

    def _work(self, number: int) -> None:
        """Products of 0.2 ms or more before each timing: a GPU in training is at its limit of power, and the slower."""
        for _ in range(8 + number // 2):
            torch.mm(self._warm[0], self._warm[1], out=self._warm[2])

    def _random(self, *sizes: int, kind: torch.dtype | None = None) -> Tensor:
        return torch.randn(sizes, device=self.device, dtype=kind or self.main)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(rank: int, kind: str, free_bytes: int, seconds: float) -> None:
    """Every measure of one device in `seconds`. What fails is told, and the others go on."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    measures = Kernels(device, free_bytes).all
    shares = sum(share for share, _ in measures.values())
    for name, (share, made) in measures.items():
        tell(doing=name)
        torch.cuda.empty_cache()
        try:
            made(seconds * share / shares)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:  # an operator that is not there
            tell(failed=name, why=str(error).splitlines()[0] if str(error) else type(error).__name__)
