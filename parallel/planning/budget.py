"""How long a plan trains for a number of tokens, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.errors import InputError
from parallel.planning.planner import Plan
from parallel.planning.quantities import count

_DAY = 24 * 3600


@dataclass(frozen=True)
class Budget:
    """`price` is of one device for an hour, in any currency; None where it is not known."""

    tokens: float
    price: float | None = None

    @classmethod
    def of(cls, tokens: str | None, price: str | None) -> Budget | None:
        """From the command line; None where no tokens are given. InputError for what is no number above 0."""
        if tokens is None:
            if price is not None:
                raise InputError("--price", price, "is paid for a number of tokens: give --tokens too", "--tokens 1T")
            return None
        return cls(count("--tokens", tokens), None if price is None else count("--price", price))

    def days(self, plan: Plan) -> float:
        """At the predicted speed, without restarts and validation."""
        return self.tokens / plan.tokens_per_second / _DAY

    def cost(self, plan: Plan, devices: int) -> float | None:
        """Of all the cluster's devices, those that a layout leaves idle too."""
        return None if self.price is None else self.days(plan) * 24 * devices * self.price

    def as_dict(self, plan: Plan, devices: int) -> dict[str, float | None]:
        return {"days": self.days(plan), "cost": self.cost(plan, devices)}
