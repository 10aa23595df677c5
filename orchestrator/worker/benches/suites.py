"""What one rank runs of a bench: which works, at which sizes; each way's figures are told as a JSON line."""

from __future__ import annotations

import faulthandler
import gc
from collections.abc import Collection
from typing import Any

import torch

from jobs.spec import JobSpec
from orchestrator.worker import determinism
from orchestrator.worker.benches import experts, layers, offload, operations, sharing, training
from orchestrator.worker.benches.measure import matmul_flops
from orchestrator.worker.engines.cuda_stand_in import install
from orchestrator.worker.profiling.timing import tell
from parallel.layout import Layout

ROUNDS = {"cuda": 12, "cpu": 5}
SEQUENCES = tuple(2**power for power in range(12, 18))
EXPERTS = (8, 16, 32, 64, 128, 256)
TOKENS = 8192
"""Of a batch of layers, in sequences of 4,096; of a sweep, or one sequence where it is longer."""
SHARING_SECONDS = 150.0
"""Of one mixture: ranks that wait for one another longer than that tell where, and end."""


def kernels(rank: int, kind: str) -> None:
    """Expert MLPs of several models with even and skewed loads, and the operations around them."""
    device = _device(rank, kind)
    _ceiling(device)
    for name, shape in (experts.GPU if kind == "cuda" else experts.CPU).items():
        for skewed in (False, True):
            load = "skewed" if skewed else "even"
            tell(doing=f"experts of {name}, {load} loads")
            found = experts.measure(shape, device, skewed=skewed, rounds=ROUNDS[kind])
            for way, figures in found.items():
                tell(result={"work": f"experts of {name}", "load": load, "way": way, **figures})
    tell(doing="operations")
    for work, ways in operations.measure(device, ROUNDS[kind]).items():
        for way, figures in ways.items():
            tell(result={"work": work, "way": way, **figures})


def layer(rank: int, kind: str) -> None:
    """Two layers of several models by several ways; then how cost grows with sequence and experts."""
    device = _device(rank, kind)
    _ceiling(device)
    length, small = (4096, ()) if kind == "cuda" else (128, layers.SMALLER)
    tokens = TOKENS if kind == "cuda" else length
    for name, shape in layers.SHAPES.items():
        tell(doing=f"layers of {name}")
        for work, ways in ((name, layers.PEERS), (f"{name}, our ways", layers.OURS)):
            _tell_layers(work, (*shape, *small), device, tokens // length, length, ROUNDS[kind], ways)
        tell(doing=f"whether gradients of {name} come out alike")
        alike = layers.repeated((*shape, *small), device, batch=tokens // length, sequence=length)
        tell(result={"work": f"gradients of {name}, computed again", "way": "fivefold, deterministic", **alike})
    mixtral = layers.SHAPES["mixtral_8x7b"]
    for length in SEQUENCES if kind == "cuda" else ():
        tell(doing=f"sequences of {length}")
        _tell_layers(f"sequence {length}", mixtral, device, max(1, TOKENS // length), length, 3)
    for count in EXPERTS if kind == "cuda" else ():
        tell(doing=f"{count} experts")
        fine = (*mixtral, f"model.experts={count}", "model.top_k=8", "model.expert_ffn=2048")
        _tell_layers(f"experts {count}", fine, device, 2, 4096, 5)


def activations(rank: int, kind: str) -> None:
    """A long sequence with its activations kept, recomputed, and swapped."""
    device = _device(rank, kind)
    _ceiling(device)
    sequence = 131_072 if kind == "cuda" else 512
    tell(doing=f"a sequence of {sequence:,}")
    for found in offload.compare(device, 5, sequence):
        tell(result=found)


def longest(rank: int, kind: str) -> None:
    """The longest sequence that a device trains with layers recomputed, and with activations swapped."""
    device = _device(rank, kind)
    _ceiling(device)
    unit, limit = (2_048, 1_048_576) if kind == "cuda" else (256, 4096)
    tell(doing="the longest sequence")
    for found in offload.longest(device, 16, unit, limit, 1 / 4):
        tell(result=found)


def shared(rank: int, kind: str, name: str) -> None:
    """Steps of one mixture with experts that ranks share, and without."""
    faulthandler.dump_traceback_later(SHARING_SECONDS, exit=True)
    device = torch.device(kind, rank if kind == "cuda" else 0)
    ceiling = matmul_flops(device)
    if rank == 0:
        tell(ceiling=ceiling)
    sharing.measure(rank, kind, name, device)
    faulthandler.cancel_dump_traceback_later()


def _tell_layers(
    work: str,
    shape: tuple[str, ...],
    device: torch.device,
    batch: int,
    sequence: int,
    rounds: int,
    ways: Collection[str] = ("fivefold",),
) -> None:
    found = layers.measure(shape, device, batch=batch, sequence=sequence, rounds=rounds, names=ways)
    for way, figures in found.items():
        tell(result={"work": work, "way": way, "batch": batch, "sequence": sequence, **figures})
    gc.collect()  # models are cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()


def train(rank: int, kind: str, job: JobSpec, layout: Layout, micro_batch: int, steps: int) -> dict[str, Any]:
    device = torch.device(kind, rank if kind == "cuda" else 0)
    ceiling = matmul_flops(device)
    return {**training.measure(rank, job, layout, micro_batch, steps, device), "ceiling": ceiling}


def _device(rank: int, kind: str) -> torch.device:
    if kind == "cpu":
        install()
        return torch.device("cpu")
    determinism.allow()
    # Peers beside one another leave holes that none of them fills.
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    return torch.device("cuda", rank)


def _ceiling(device: torch.device) -> None:
    tell(doing="a large product")
    tell(ceiling=matmul_flops(device))
