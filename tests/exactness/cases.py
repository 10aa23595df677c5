"""Draws the layouts that are held against the oracle: what the capability table accepts, every pair of features twice.

A greedy covering array: cases are drawn at random from all that an engine may be asked for, those that the table
refuses are put aside, and of the rest the one that covers most pairs for its cost is taken, again and again.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import or_
from typing import Any

from variants import GLOBAL_BATCH, VARIANTS, job

from jobs.spec import DEGREES, SIMPLEST, JobSpec, LayoutSpec
from parallel.capabilities import why_refused
from parallel.layout import Layout, divisors

ENGINES = ("megatron", "deepspeed")
WORLDS = (1, 2, 4, 8)
OFTEN = (1, 4, 6, 6)
"""How often each world is drawn, relative: more can differ in a larger one, and more is refused."""

COST = {1: 1.0, 2: 1.5, 4: 2.5, 8: 4.0}
"""Seconds of a case, by its world, relative."""

FEWEST_CASES, SUBSET, DRAWN = 128, 30, 16_000
TIMES = 2
"""How often each pair of features is covered together, in each engine."""

OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "context_attention": tuple({"context_attention": kind} for kind in ("gather", "ring", "ulysses")),
    "dispatcher": ({"dispatcher": "allgather"}, {"dispatcher": "flex"}),
    "expert_parallelism": ({"expert_parallelism": "fssdp", "expert_copies": 2},),
    "recompute": (
        {"recompute": "full"},
        *(
            {"recompute": "selective", "recompute_modules": (module,)}
            for module in ("core_attn", "layernorm", "mlp", "moe", "shared_experts")
        ),
    ),
    "zero_stage": ({"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}),
    "optimizer_replicas": ({"optimizer_replicas": 2},),
    "offload_optimizer": ({"offload_optimizer": "cpu"},),
    "offload_parameters": ({"offload_parameters": "cpu", "zero_stage": 3},),
    "offload_activations": ({"offload_activations": 0.0}, {"offload_activations": 0.5}),
    "drop": ({"drop": "probs"}, {"drop": "position"}),
    "packed": ({"packed": True},),
}
"""What beside its degrees a case may ask for, choice by choice; each choice is a feature."""


@dataclass(frozen=True)
class Case:
    engine: str
    variant: str
    layout: LayoutSpec
    """Every degree and the micro-batch filled in."""
    drop: str = "none"
    packed: bool = False

    @property
    def job(self) -> JobSpec:
        return _job(self.engine, self.variant, self.drop, self.packed).model_copy(update={"layout": self.layout})

    @property
    def runs(self) -> bool:
        return why_refused(self.job) is None

    @property
    def world(self) -> int:
        return Layout.of(self.layout).world

    @property
    def name(self) -> str:
        options = (feature for feature in sorted(self.features) if feature not in DEGREES)
        parts = (self.engine, self.variant, Layout.of(self.layout).label, f"mb{self.layout.micro_batch}", *options)
        return " ".join(parts)

    @property
    def features(self) -> frozenset[str]:
        """Axes above 1, and what is chosen otherwise than by default."""
        found = {axis for axis, degree in self.layout.degrees.items() if degree > 1}
        for field in ("context_attention", "dispatcher"):
            value = getattr(self.layout, field)
            if value != LayoutSpec.model_fields[field].default:
                found.add(f"{field}={value}")
        options = self.layout.options
        for field in ("zero_stage", "optimizer_replicas"):
            if options[field] != SIMPLEST[field]:
                found.add(f"{field}={options[field]}")
        found.update(field for field in ("offload_optimizer", "offload_parameters") if options[field] != "none")
        if self.layout.offload_activations is not None:
            found.add(f"offload_activations={self.layout.offload_activations:g}")
        if self.layout.expert_parallelism == "fssdp":
            found.add("fssdp")
        if options["recompute"] == "full":
            found.add("recompute=full")
        elif options["recompute"] == "selective":
            found.update(f"recompute={module}" for module in options["recompute_modules"])
        if self.drop != "none":
            found.add(f"drop={self.drop}")
        if self.packed:
            found.add("packed")
        return frozenset(found)


@cache
def _job(engine: str, variant: str, drop: str, packed: bool) -> JobSpec:
    model = VARIANTS[variant]
    if drop != "none":
        model = model.model_copy(update={"capacity_factor": 1.0, "drop_order": drop})
    return job(model, engine, LayoutSpec(), packing=packed)


@cache
def degrees(world: int) -> tuple[dict[str, int], ...]:
    """Every attention mesh of `world` ranks, with and without virtual stages, and every expert mesh over it."""
    found = []
    for tp, cp, dp in itertools.product(divisors(world), repeat=3):
        pp, rest = divmod(world, tp * cp * dp)
        if rest or not pp:
            continue
        plane = tp * cp * dp
        for vpp, etp in itertools.product((1, 2) if pp > 1 else (1,), divisors(plane)):
            for ep in divisors(plane // etp):
                found.append({"tp": tp, "cp": cp, "dp": dp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp})
    return tuple(found)


def asked(variant: str, mesh: dict[str, int], chosen: dict[str, Any]) -> bool:
    """Whether each of the chosen options, and each expert degree, means something to this model at this mesh."""
    model = VARIANTS[variant]
    if not model.is_moe and (mesh["ep"] * mesh["etp"] > 1 or "dispatcher" in chosen or "drop" in chosen):
        return False
    module = chosen.get("recompute_modules", ("",))[0]
    return not (
        ("context_attention" in chosen and mesh["cp"] == 1)
        or ("expert_parallelism" in chosen and mesh["ep"] == 1)
        or (chosen.get("optimizer_replicas", 1) > mesh["dp"] * mesh["cp"])
        or (module == "moe" and not model.is_moe)
        or (module == "shared_experts" and not model.shared_expert_ffn)
        or (module == "mlp" and model.dense_layers == 0)
    )


def case(engine: str, variant: str, mesh: dict[str, int], micro_batch: int, chosen: dict[str, Any]) -> Case:
    fields = {name: value for name, value in chosen.items() if name not in ("drop", "packed")}
    layout = LayoutSpec.model_construct(**{**_DEFAULTS, **mesh, "micro_batch": micro_batch, **fields})
    return Case(engine, variant, layout, chosen.get("drop", "none"), chosen.get("packed", False))


_DEFAULTS = LayoutSpec().model_dump()


def micro_batch_choices(mesh: dict[str, int]) -> tuple[int, ...]:
    """Sizes of which a rank takes two a step, or as many as there are stages: enough to add up, and quick."""
    share = GLOBAL_BATCH // mesh["dp"]
    counts = {min(share, 2), min(share, mesh["pp"])}
    return tuple(sorted(share // count for count in counts))


@cache
def viable(engine: str, variant: str) -> tuple[tuple[dict[str, Any], ...], ...]:
    """OPTIONS without the choices that are refused at every mesh, which would only be drawn in vain."""
    found = []
    for choices in OPTIONS.values():
        run = (each for each in choices if any(candidate.runs for candidate in alone(engine, variant, each)))
        found.append(tuple(run))
    return tuple(choices for choices in found if choices)


def alone(engine: str, variant: str, chosen: dict[str, Any]) -> Iterator[Case]:
    """Every case of a model with these options and no other."""
    for mesh in itertools.chain.from_iterable(map(degrees, WORLDS)):
        if asked(variant, mesh, chosen):
            for micro_batch in micro_batch_choices(mesh):
                yield case(engine, variant, mesh, micro_batch, chosen)


def drawn(random_numbers: random.Random, number: int) -> Iterator[Case]:
    """Cases that mean something, accepted or not: engines and models alike, an option one time in three."""
    for _ in range(number):
        engine, variant = random_numbers.choice(ENGINES), random_numbers.choice(list(VARIANTS))
        world = random_numbers.choices(WORLDS, OFTEN)[0]
        mesh = random_numbers.choice(degrees(world))
        chosen: dict[str, Any] = {}
        for choices in viable(engine, variant):
            if random_numbers.random() < 1 / 3:
                chosen |= random_numbers.choice(choices)
        if asked(variant, mesh, chosen):
            yield case(engine, variant, mesh, random_numbers.choice(micro_batch_choices(mesh)), chosen)


Pair = tuple[str, str, str]
"""Engine and two features."""


def pairs(of: Case) -> set[Pair]:
    """The pairs of features that a case has together. Its model counts as one, and its world where it is above one."""
    features = of.features | {of.variant, f"world {of.world}"}
    found = itertools.combinations(sorted(features), 2)
    return {(of.engine, *pair) for pair in found if "world 1" not in pair} | {
        (of.engine, of.variant, f"world {of.world}")
    }


def cost(of: Case) -> float:
    """Seconds of a case, relative, as docs/exactness/cpu-fp32.json has them."""
    micro_batches = GLOBAL_BATCH // ((of.layout.dp or 1) * (of.layout.micro_batch or 1))
    again = 1.5 if of.layout.recompute == "full" else 1.0
    return COST[of.world] * micro_batches * again * (2.0 if of.layout.zero_stage == 3 else 1.0)


def cover(pool: list[Case], number: int, times: int, *, cheaply: bool = False) -> list[Case]:
    """Cases of `pool` that have each of its pairs `times` times, or as often as it has them, and at least `number`;
    `cheaply`: the first `number` of them alone, those that cost least for what they cover."""
    covered = [pairs(each) for each in pool]
    holders = Counter(pair for found in covered for pair in found)
    numbers = {pair: index for index, pair in enumerate(holders)}
    masks = [sum(1 << numbers[pair] for pair in found) for found in covered]
    weights = [cost(each) if cheaply else 1.0 for each in pool]
    left, missing = {pair: min(times, count) for pair, count in holders.items()}, (1 << len(numbers)) - 1
    chosen: list[int] = []
    while (missing and not cheaply) or len(chosen) < min(number, len(pool)):
        if not missing:  # once more
            left, missing = dict.fromkeys(holders, 1), reduce(or_, masks)
        best = max(
            (index for index in range(len(pool)) if masks[index]),
            key=lambda index: (masks[index] & missing).bit_count() / weights[index],
        )
        chosen.append(best)
        masks[best] = 0
        for pair in covered[best]:
            left[pair] -= 1
            if left[pair] == 0:
                missing &= ~(1 << numbers[pair])
    return [pool[index] for index in chosen]


@cache
def accepted(seed: int) -> tuple[Case, ...]:
    """All of DRAWN draws from `seed` that the table accepts, each once."""
    found: dict[str, Case] = {}
    for each in drawn(random.Random(seed), DRAWN):
        if each.runs:
            found.setdefault(each.name, each)
    return tuple(found.values())


@cache
def matrix(seed: int = 0) -> tuple[Case, ...]:
    """What `make exact` runs."""
    return tuple(cover(list(accepted(seed)), FEWEST_CASES, TIMES))


@cache
def subset() -> tuple[Case, ...]:
    """What `make test` runs of it."""
    return tuple(cover(list(matrix()), SUBSET, 1, cheaply=True))


def refusals(pair: Pair) -> list[str] | None:
    """Why no case has a pair of features together: the reasons that all cases with these two alone are refused for.

    Empty where the two exclude each other by what they mean; None where a case is accepted.
    """
    engine, *features = pair
    options = {name: each for choices in OPTIONS.values() for each in choices for name in _named(each)}
    wanted = [options[feature] for feature in features if feature in options]
    chosen = {name: value for option in wanted for name, value in option.items()}
    reasons: Counter[str] = Counter()
    for candidate in itertools.chain.from_iterable(alone(engine, variant, chosen) for variant in VARIANTS):
        if set(features) <= candidate.features | {candidate.variant, f"world {candidate.world}"}:
            why = why_refused(candidate.job)
            if why is None:
                return None
            reasons[why] += 1
    return [reason for reason, _ in reasons.most_common()]


def _named(option: dict[str, Any]) -> frozenset[str]:
    layout = {name: value for name, value in option.items() if name not in ("drop", "packed")}
    drop, packed = option.get("drop", "none"), option.get("packed", False)
    return Case("megatron", "mixtral", LayoutSpec(**layout), drop, packed).features


def features() -> list[str]:
    """All of them: axes, options, models, worlds."""
    options = {name for choices in OPTIONS.values() for each in choices for name in _named(each)}
    return [*DEGREES, *sorted(options), *VARIANTS, *(f"world {world}" for world in WORLDS)]


def uncovered(cases: Sequence[Case]) -> dict[Pair, list[str] | None]:
    """`refusals` of the pairs of features that no case has; a feature that none has by itself is paired with itself."""
    found = {pair for each in cases for pair in pairs(each)}
    wanted: list[Pair] = []
    for engine in ENGINES:
        present = {feature for held, *both in found if held == engine for feature in both}
        wanted += [(engine, feature, feature) for feature in features() if feature not in present]
        wanted += [(engine, *pair) for pair in itertools.combinations(sorted(present - {"world 1"}), 2)]
    return {pair: refusals(pair) for pair in wanted if pair not in found}
