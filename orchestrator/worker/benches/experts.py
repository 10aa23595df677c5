"""Expert MLPs, forward and backward, on loads as routers make them: this project's kernels and what else there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.experts import expert_mlp, plain_expert_mlp
from orchestrator.worker.benches.measure import kept_bytes, side_by_side

Mlp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Routed rows, their experts and widths."""

    experts: int
    rows: int
    hidden: int
    width: int

    @property
    def flops(self) -> float:
        """Forward and backward: three matrices, each in three products."""
        return 18.0 * self.rows * self.hidden * self.width


GPU = {
    "mixtral_8x7b": Shape(8, 16_384, 4096, 14_336),
    "qwen2_57b_a14b": Shape(64, 65_536, 3584, 2560),
    "qwen3_30b_a3b": Shape(128, 65_536, 2048, 768),
    "deepseek_v3 at ep8": Shape(32, 65_536, 7168, 2048),
}
"""Rows of 8,192 tokens; of DeepSeek-V3, what eight ranks of 8,192 tokens send to one."""
CPU = {"small": Shape(8, 512, 128, 256)}


def loads(shape: Shape, skewed: bool) -> Tensor:
    """How many rows each expert has: as many, or as weights drawn from an exponential say.

    The busiest of 64 experts then has 3.6 times the mean, of 128 6.2 times.
    """
    if not skewed:
        return torch.full((shape.experts,), shape.rows // shape.experts)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(shape.experts, generator=generator).log().neg()
    drawn = torch.multinomial(weights, shape.rows, replacement=True, generator=generator)
    return torch.bincount(drawn, minlength=shape.experts)


def by_grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """torch's grouped product, and operations between."""
    gate, up = torch._grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, -1)
    return torch._grouped_mm(functional.silu(gate) * up * weights[:, None], down.mT, offs=ends)


def by_loop(rows: Tensor, weights: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """An expert after another, as Megatron-Core's SequentialMLP."""
    last = ends.tolist()
    out = []
    for index, (begin, end) in enumerate(zip([0, *last], last, strict=False)):
        gate, up = (rows[begin:end] @ gate_up[index].T).chunk(2, -1)
        out.append((functional.silu(gate) * up * weights[begin:end, None]) @ down[index].T)
    return torch.cat(out)


def by_padding(rows: Tensor, weights: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Batched products of all experts' rows, padded to the busiest expert's."""
    experts, count = len(ends), len(rows)
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    most = int((ends - begins).max())
    place = torch.arange(count, device=rows.device)
    expert = torch.searchsorted(ends, place, right=True)
    cell = expert * most + place - begins[expert]
    padded = rows.new_zeros(experts * most, rows.shape[1]).index_copy(0, cell, rows).view(experts, most, -1)
    by = weights.new_zeros(experts * most).index_copy(0, cell, weights).view(experts, most, 1)
    gate, up = torch.bmm(padded, gate_up.mT).chunk(2, -1)
    return torch.bmm(functional.silu(gate) * up * by, down.mT).flatten(0, 1)[cell]


WAYS: dict[str, Mlp] = {
    "fivefold": expert_mlp,
    "torch grouped_mm": by_grouped_mm,
    "loop": by_loop,
    "padded bmm": by_padding,
}


def measure(shape: Shape, device: torch.device, *, skewed: bool, rounds: int) -> dict[str, dict[str, Any]]:
    """By way: seconds, FLOP/s, bytes kept, and the error beside fp64: of result and gradients, the largest."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    ends = loads(shape, skewed).cumsum(0).to(torch.int32).to(device)
    tensors = [
        torch.randn(size, device=device, dtype=dtype).mul_(scale).requires_grad_()
        for size, scale in (
            ((shape.rows, shape.hidden), 1.0),
            ((shape.rows,), 1.0),
            ((shape.experts, 2 * shape.width, shape.hidden), shape.hidden**-0.5),
            ((shape.experts, shape.hidden, shape.width), shape.width**-0.5),
        )
    ]
    rows, weights, gate_up, down = tensors
    grad = torch.randn(shape.rows, shape.hidden, device=device, dtype=dtype)

    def both(way: Mlp) -> None:
        for tensor in tensors:
            tensor.grad = None
        way(rows, weights, ends, gate_up, down).backward(grad)

    times = side_by_side({name: lambda way=way: both(way) for name, way in WAYS.items()}, device, rounds)
    forward = side_by_side(
        {name: torch.no_grad()(lambda way=way: way(rows, weights, ends, gate_up, down)) for name, way in WAYS.items()},
        device,
        rounds,
    )
    return {
        name: {
            "seconds": vars(times[name]),
            "flops_per_second": shape.flops / times[name].median,
            "forward_flops_per_second": shape.flops / 3 / forward[name].median,
            "kept_bytes": kept_bytes(lambda way=way: way(rows, weights, ends, gate_up, down), (*tensors, ends)),
            "error": _error(way, device, dtype),
        }
        for name, way in WAYS.items()
    }


def _error(way: Mlp, device: torch.device, dtype: torch.dtype) -> float:
    """On a small shape with an expert that nobody chose, beside fp64's plain torch on what `dtype` holds."""
    torch.manual_seed(1)
    ends = torch.tensor([100, 100, 356, 357], dtype=torch.int32, device=device)
    sizes = ((357, 256), (357,), (4, 256, 256), (4, 256, 128))
    given = [torch.randn(size, device=device, dtype=dtype) for size in sizes]
    grad = torch.randn(357, 256, device=device, dtype=dtype)

    def results(mlp: Mlp, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
        tensors = [tensor.clone().requires_grad_() for tensor in tensors]
        out = mlp(tensors[0], tensors[1], ends, tensors[2], tensors[3])
        return [out.detach(), *torch.autograd.grad(out, tensors, grad)]

    ours = results(way, given, grad)
    theirs = results(plain_expert_mlp, [tensor.double() for tensor in given], grad.double())
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
