"""How far a layout's training lies from the oracle's, and whether that is rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jobs.architecture import ModelArchitecture
from jobs.tensors import tensors
from orchestrator.worker.exactness.oracle import NEAR_TIE, Account
from orchestrator.worker.exactness.trial import Block, Trained


@dataclass(frozen=True)
class Bars:
    """Largest relative deviations that are rounding."""

    losses: float
    grad_norms: float
    weights: float
    biases: bool = True
    """Whether biases count among the weights."""


FP32 = Bars(losses=1e-5, grad_norms=1e-4, weights=1e-4)
"""Of 20 Adam steps in fp32 over a tiny model: losses and gradient norms of each step, weights tensor by tensor."""


def _bf16(layers: int, steps: int, labels: int) -> Bars:
    """What bf16 may do to `steps` of a model of `layers` whose loss is a mean over `labels`, against fp32.

    bf16 keeps 8 bits: each operation rounds by a relative u = 2^-8 at most. A token's hidden state, and its gradient on
    the way back, pass about 16 such roundings a layer each way, and each step adds its own to the weights; as they are
    independent, n of them come to u * sqrt(n). That bounds gradients and what they move, so the weights. Biases begin
    at zero, so that all of one is what moved it: a router's goes by signs of counts of tokens, and a key's by a small
    gradient, of which softmax sees only what positions tell apart. They are left out. A loss averages
    over its labels, which divides its error by sqrt(labels).
    Measured on CPUs over the models of tests/exactness: losses to 8e-3, gradient norms to 0.21, weights to 0.27.
    """
    grown = 2**-8 * math.sqrt(2 * 16 * layers * steps)
    return Bars(losses=grown / math.sqrt(labels), grad_norms=grown, weights=grown, biases=False)


BF16 = _bf16(layers=8, steps=20, labels=80)
"""Losses 0.031, gradient norms and weights 0.28: a layout that is wrong by little is found in fp32, on any device."""


@dataclass(frozen=True)
class Deviation:
    """The largest of its kind, relative; `where`: the step or the tensor."""

    largest: float
    bar: float
    where: str

    @property
    def holds(self) -> bool:
        return self.largest <= self.bar  # false for NaN


@dataclass(frozen=True)
class Verdict:
    losses: Deviation
    grad_norms: Deviation
    weights: Deviation
    narrowest_choice: float
    """Of the oracle's routers: below oracle.NEAR_TIE a deviation may be a choice that rounding made otherwise."""

    @property
    def exact(self) -> bool:
        return self.losses.holds and self.grad_norms.holds and self.weights.holds

    def as_dict(self) -> dict[str, Any]:
        choice = self.narrowest_choice
        return {**asdict(self), "narrowest_choice": choice if math.isfinite(choice) else None, "exact": self.exact}

    def __str__(self) -> str:
        parts = [
            f"{name} {found.largest:.1e} at {found.where} (bar {found.bar:.0e}{'' if found.holds else ': EXCEEDED'})"
            for name, found in (
                ("losses", self.losses),
                ("grad norms", self.grad_norms),
                ("weights", self.weights),
            )
        ]
        if self.narrowest_choice < NEAR_TIE:
            parts.append(f"a router's choice was as narrow as {self.narrowest_choice:.1e}: try another seed")
        return "; ".join(parts)


def compare(trained: Trained, account: Account, model: ModelArchitecture, bars: Bars = FP32) -> Verdict:
    """Weights: of each tensor, the norm of the difference over the norm, of its worst replicas."""
    return Verdict(
        losses=_along_steps(trained.losses, account.losses, bars.losses),
        grad_norms=_along_steps(trained.grad_norms, account.grad_norms, bars.grad_norms),
        weights=_of_weights(trained.blocks, account, model, bars),
        narrowest_choice=account.narrowest_choice,
    )


def _along_steps(found: Sequence[float], expected: Sequence[float], bar: float) -> Deviation:
    deviations = [abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True)]
    return _worst([(deviation, f"step {step}") for step, deviation in enumerate(deviations, 1)], bar)


def _of_weights(blocks: Sequence[Block], account: Account, model: ModelArchitecture, bars: Bars) -> Deviation:
    """ValueError where the blocks of a tensor are not all of it."""
    held: dict[str, list[Block]] = {}
    for block in blocks:
        held.setdefault(block.name, []).append(block)
    found = []
    for name, shape in tensors(model).items():
        expected = account.weights[name]
        worst: dict[tuple[int, ...], float] = {}
        elements: dict[tuple[int, ...], int] = {}
        for block in held.pop(name, []):
            worst[block.offset] = max(worst.get(block.offset, 0.0), _nan_last(block.distance(expected)))
            elements[block.offset] = block.values.size
        if sum(elements.values()) != math.prod(shape):
            raise ValueError(f"ranks hold {sum(elements.values())} elements of {name}, which has {math.prod(shape)}")
        if name.endswith(".bias") and not bars.biases:
            continue
        difference, norm = math.hypot(*worst.values()), float(np.linalg.norm(expected))
        found.append((difference / norm if norm else (math.inf if difference else 0.0), name))
    if held:
        raise ValueError(f"ranks hold tensors that the model has not: {', '.join(held)}")
    return _worst(found, bars.weights)


def _worst(found: list[tuple[float, str]], bar: float) -> Deviation:
    largest, where = max(found, key=lambda pair: _nan_last(pair[0]))
    return Deviation(largest, bar, where)


def _nan_last(number: float) -> float:
    return math.inf if math.isnan(number) else number
