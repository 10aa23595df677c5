"""A 5D parallel layout: two meshes over the same ranks, checked once at construction.

Attention (and every dense layer) is laid out on TP x CP x DP x PP, experts on ETP x EP x EDP x PP. Both share the
pipeline axis and the ranks; "folding" (MoE Parallel Folding, Liu et al. 2025) is that the other axes of the two meshes
need not agree. Rank order is Megatron-Core's `tp-cp-ep-dp-pp`: tp varies fastest, pp slowest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

from jobs.errors import InputError
from jobs.spec import LayoutSpec

ATTENTION_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")

Group = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Degrees of every axis. `edp` follows from the others; `sp` (sequence parallelism) goes with tp > 1 unless set."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    sp: bool | None = None
    stage_layers: tuple[int, ...] | None = None
    """Layers of each pipeline stage, first to last; None: equally many."""

    def __post_init__(self) -> None:
        for axis in ("tp", "cp", "dp", "pp", "vpp", "ep", "etp"):
            degree = getattr(self, axis)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise InputError(f"layout.{axis}", degree, "a degree is a whole number of at least 1", 1)
        if self.sp is None:
            object.__setattr__(self, "sp", self.tp > 1)
        if self.sp and self.tp == 1:
            raise InputError("layout.sp", True, "sequence parallelism needs tp above 1", False)
        if self.vpp > 1 and self.pp == 1:
            raise InputError("layout.vpp", self.vpp, f"virtual stages need pp above 1, pp={self.pp}", 1)
        if self.stage_layers is not None:
            self._check_stages(self.stage_layers)
        plane = self.tp * self.cp * self.dp
        if plane % (self.etp * self.ep):
            raise InputError(
                "layout.ep",
                self.ep,
                f"etp*ep={self.etp}*{self.ep}={self.etp * self.ep} does not divide "
                f"tp*cp*dp={self.tp}*{self.cp}*{self.dp}={plane}",
                nearest_divisor(plane // self.etp, self.ep) if plane % self.etp == 0 else None,
            )

    def _check_stages(self, layers: tuple[int, ...]) -> None:
        if len(layers) != self.pp:
            raise InputError("layout.stage_layers", list(layers), f"names {len(layers)} stages, pp={self.pp}")
        if min(layers) < 1:
            raise InputError("layout.stage_layers", list(layers), "each stage has at least one layer")
        if self.vpp > 1:
            raise InputError("layout.vpp", self.vpp, "stages of unequal layers have no virtual ones", 1)

    @classmethod
    def of(cls, spec: LayoutSpec) -> Layout:
        """The layout of a resolved spec; degrees that it leaves None are 1."""
        given: dict[str, Any] = dict(spec.degrees)
        return cls(**given, stage_layers=spec.stage_layers)

    def layers_of(self, stage: int, layers: int) -> range:
        """Of a model of so many layers, those of a pipeline stage (without virtual ones), from 0."""
        each = self.stage_layers or (layers // self.pp,) * self.pp
        return range(sum(each[:stage]), sum(each[: stage + 1]))

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def edp(self) -> int:
        """Replicas of each expert shard."""
        return self.tp * self.cp * self.dp // (self.etp * self.ep)

    def degree(self, axis: str) -> int:
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a global rank on both meshes: {tp, cp, dp, pp, etp, ep, edp}."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not within 0..{self.world - 1}")
        found: dict[str, int] = {}
        for mesh in (ATTENTION_AXES, EXPERT_AXES):
            rest = rank
            for axis in mesh:
                rest, found[axis] = divmod(rest, self.degree(axis))
        return found

    def rank(self, **coordinates: int) -> int:
        """Inverse of `coordinates`, from all axes of either mesh."""
        mesh = ATTENTION_AXES if set(coordinates) == set(ATTENTION_AXES) else EXPERT_AXES
        if set(coordinates) != set(mesh):
            raise ValueError(f"give all of {ATTENTION_AXES} or all of {EXPERT_AXES}, not {sorted(coordinates)}")
        rank, stride = 0, 1
        for axis in mesh:
            if not 0 <= coordinates[axis] < self.degree(axis):
                raise ValueError(f"{axis}={coordinates[axis]} is not within 0..{self.degree(axis) - 1}")
            rank += coordinates[axis] * stride
            stride *= self.degree(axis)
        return rank

    def groups(self, *axes: str) -> list[Group]:
        """Ranks that differ only along `axes` (all of one mesh), each group and the list in ascending order.

        `groups("tp")` are the tensor-parallel groups, `groups("dp", "cp")` those over which dense gradients are
        reduced, `groups("edp")` those of expert gradients.
        """
        mesh = ATTENTION_AXES if set(axes) <= set(ATTENTION_AXES) else EXPERT_AXES
        if not axes or not set(axes) <= set(mesh):
            raise ValueError(f"axes {axes} are not of one mesh: {ATTENTION_AXES} or {EXPERT_AXES}")
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            at = self.coordinates(rank)
            members.setdefault(tuple(at[axis] for axis in mesh if axis not in axes), []).append(rank)
        return sorted(tuple(group) for group in members.values())

    @cached_property
    def label(self) -> str:
        """Degrees above 1, for a table or a log line: `tp2 dp2 ep2`, `pp2 (3+5 layers)`."""
        axes = ("tp", "cp", "dp", "pp", "vpp", "ep", "etp")
        shown = [f"{axis}{self.degree(axis)}" for axis in axes if self.degree(axis) > 1]
        if self.stage_layers is not None:
            shown.append(f"({'+'.join(map(str, self.stage_layers))} layers)")
        return " ".join(shown) or "one rank"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "edp": self.edp}


@cache
def divisors(number: int) -> tuple[int, ...]:
    """In ascending order."""
    return tuple(candidate for candidate in range(1, number + 1) if number % candidate == 0)


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` closest to `wanted`, the smaller of two."""
    return min(divisors(number), key=lambda divisor: (abs(divisor - wanted), divisor))
