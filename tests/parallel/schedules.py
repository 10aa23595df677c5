"""Random pipeline schedules over swapped activations whose copies are late, by chance: no hang, exact gradients.

    make fuzz-schedules      # tests/parallel/schedules.py 10000 docs/benchmarks/schedules.json

A stage of small layers in fp64 goes through 1F1B or an interleaved schedule twice, the second time with the order
known; its gradients are held against those of the same stage without swapping to 1e-12.
"""

from __future__ import annotations

import json
import platform
import random
import signal
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallel import offload
from parallel.host_link import ThreadLink
from parallel.offload import WHOLE, Swap

TOKENS, HIDDEN, LAYERS = 12, 4, 4
SLICE = 5
"""Tokens at a time: some layers are cut in three."""
PATIENCE_SECONDS = 60
CPU = torch.device("cpu")


class Pass(NamedTuple):
    is_forward: bool
    chunk: int
    micro_batch: int


class Schedule(NamedTuple):
    """What one pipeline stage does in a step, whose layers are in so many virtual stages."""

    kind: str
    chunks: int
    passes: tuple[Pass, ...]


def schedule(draw: random.Random) -> Schedule:
    """1F1B or interleaved, of any stage."""
    chunks = draw.choice((1, 1, 2, 4))
    stages = draw.randint(1, 4) if chunks == 1 else draw.randint(2, 4)
    stage = draw.randrange(stages)
    micro_batches = stages * draw.randint(1, 2) if chunks > 1 else draw.randint(1, 6)
    total = micro_batches * chunks
    behind = stages - stage - 1
    warm = min(total, behind if chunks == 1 else 2 * behind + (chunks - 1) * stages)

    def place(at: int, is_forward: bool) -> tuple[int, int]:
        group, within = divmod(at, stages * chunks)
        chunk = within // stages
        if chunks == 1:
            return 0, at
        return (chunk if is_forward else chunks - 1 - chunk), group * stages + within % stages

    order = [Pass(True, *place(at, True)) for at in range(warm)]
    for at in range(total - warm):
        order += [Pass(True, *place(warm + at, True)), Pass(False, *place(at, False))]
    order += [Pass(False, *place(at, False)) for at in range(total - warm, total)]
    return Schedule("1F1B" if chunks == 1 else "interleaved", chunks, tuple(order))


class Layer(nn.Module):
    """A part that computes tokens alone, one that sees all, and one that computes tokens alone again."""

    swap: Swap | None = None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden], both."""
        if self.swap is None:
            return self._finish(hidden, self._mix(*self._project(hidden)))[0]
        if WHOLE in self.swap.again:
            made: Tensor = self.swap.recomputed(
                lambda given: self._finish(given, self._mix(*self._project(given)))[0], hidden, self
            )
            return made
        visit = self.swap.visit(hidden, self)
        mixed = visit.whole(self._mix, *visit.by_token(self._project, hidden))
        return visit.close(*visit.by_token(self._finish, hidden, mixed, again="mlp" in self.swap.again))

    def _project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return (torch.tanh(hidden @ self.first),)

    def _mix(self, projected: Tensor) -> Tensor:
        return projected.cumsum(0) * projected

    def _finish(self, hidden: Tensor, mixed: Tensor) -> tuple[Tensor, ...]:
        return (hidden + torch.sigmoid(mixed @ self.second) * mixed,)


def stage(chunks: int, swap: Swap | None) -> nn.ModuleList:
    torch.manual_seed(5)
    made = nn.ModuleList(nn.Sequential(*(Layer() for _ in range(LAYERS // chunks))) for _ in range(chunks))
    for layer in made.modules():
        if isinstance(layer, Layer):
            layer.swap = swap
    return made


def gradients(model: nn.ModuleList, passes: tuple[Pass, ...], times: int = 1) -> dict[str, Tensor]:
    """Of parameters and inputs, of the last time."""
    found: dict[str, Tensor] = {}
    for _ in range(times):
        model.zero_grad()
        given: dict[Any, Tensor] = {}
        made: dict[Any, Tensor] = {}
        for is_forward, *at in passes:
            key = tuple(at)
            if is_forward:
                drawn = torch.Generator().manual_seed(100 * at[0] + at[1])
                given[key] = torch.randn(TOKENS, HIDDEN, generator=drawn, dtype=torch.float64).requires_grad_()
                made[key] = model[at[0]](given[key])
            else:
                out = made.pop(key)
                out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        found |= {f"input {key}": each.grad for key, each in given.items()}
    return found


@cache
def expected(passes: tuple[Pass, ...], chunks: int) -> dict[str, Tensor]:
    return gradients(stage(chunks, None), passes)


def tried(seed: int) -> tuple[Schedule, str]:
    """What was tried, and what came out wrong; empty: nothing."""
    draw = random.Random(seed)
    drawn = schedule(draw)
    late = random.Random(seed)
    link = ThreadLink(lambda: late.choice((0, 0, 0.0001, 0.001)))
    again = draw.choice(((), (), (), ("mlp",), (WHOLE,)))
    fraction = 0.0 if WHOLE in again else draw.choice((0.0, 0.25, 0.5, 1.0))
    swap = Swap(CPU, fraction, draw.choice((4_000, 1e9)), link, again)
    try:
        found = gradients(stage(drawn.chunks, swap), drawn.passes, times=2)
    finally:
        link.close()
    for name, tensor in expected(drawn.passes, drawn.chunks).items():
        if not torch.allclose(found[name], tensor, rtol=1e-12, atol=1e-12):
            return drawn, f"{name} is off by {(found[name] - tensor).abs().max():.1e}"
    return drawn, ""


def _give_up(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"nothing moved for {PATIENCE_SECONDS} s")


def main() -> None:
    number, path = int(sys.argv[1]), Path(sys.argv[2])
    offload.SLICE = SLICE
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _give_up)
    began, kinds, failures, passes = time.monotonic(), Counter[str](), {}, 0
    for seed in range(number):
        signal.alarm(PATIENCE_SECONDS)
        try:
            drawn, wrong = tried(seed)
        except Exception as error:  # a hang or a crash is what is looked for
            failures[seed] = f"{type(error).__name__}: {error}"
            continue
        kinds[drawn.kind] += 1
        passes += 2 * len(drawn.passes)
        if wrong:
            failures[seed] = wrong
        if seed % 1000 == 999:
            print(f"{seed + 1:6,} schedules, {len(failures)} failed, {time.monotonic() - began:.0f} s", flush=True)
    signal.alarm(0)
    document = {
        "command": f"make fuzz-schedules ({number} schedules)",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "schedules": number,
        "kinds": dict(kinds),
        "forward_and_backward_passes": passes,
        "failures": failures,
        "seconds": round(time.monotonic() - began, 1),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{number:,} schedules ({', '.join(f'{of:,} {kind}' for kind, of in kinds.items())}), {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
