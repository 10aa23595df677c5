"""Runs cases against the oracle, several side by side, each oracle once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cases import Case

from jobs.spec import JobSpec
from orchestrator.worker.exactness.oracle import Account, dispatch_groups_of, settled
from orchestrator.worker.exactness.trial import Trial, train
from orchestrator.worker.exactness.verdict import FP32, Bars, Verdict, compare
from orchestrator.worker.ranks import Ranks

SECONDS = 300
"""Longest wait for a case, or for an oracle: a rank that waits for another in vain never ends by itself."""


@dataclass(frozen=True)
class Result:
    case: Case
    verdict: Verdict | None
    """None where the engine failed."""
    error: str
    seed: int
    seconds: float

    @property
    def exact(self) -> bool:
        return self.verdict is not None and self.verdict.exact

    def __str__(self) -> str:
        return f"{self.case.name} seed {self.seed}: {self.verdict or self.error}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case.name,
            "engine": self.case.engine,
            "model": self.case.variant,
            "layout": self.case.layout.model_dump(exclude_defaults=True, mode="json"),
            "drop": self.case.drop,
            "packed": self.case.packed,
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            **(self.verdict.as_dict() if self.verdict else {"exact": False, "error": self.error}),
        }


Outcome = Callable[[Case], Result]


class Matrix:
    """`side_by_side` cases at once: a case waits for messages half of its time."""

    def __init__(
        self, ranks: Ranks, *, side_by_side: int = 2, device: str = "cpu", precision: str = "fp32", bars: Bars = FP32
    ):
        self._ranks, self._device, self._precision, self._bars = ranks, device, precision, bars
        self._pool = ThreadPoolExecutor(side_by_side)
        self._oracles: dict[Any, Future[tuple[JobSpec, Account]]] = {}
        self._lock = threading.Lock()

    def start(self, cases: Iterable[Case], seed: int = 1) -> dict[str, Future[Result]]:
        """A future result for each case by its name, run in their order. Oracles look for a seed from `seed` on."""
        return {case.name: self._pool.submit(self._run, case, seed) for case in cases}

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _run(self, case: Case, seed: int) -> Result:
        began = time.monotonic()
        try:
            job, account = self._oracle(case, seed)
            seed = job.train.seed
            train_spec = job.train.model_copy(update={"precision": self._precision})
            job = job.model_copy(update={"train": train_spec, "layout": case.layout, "engine": case.engine})
            trained = train(self._ranks, Trial(job), seconds=SECONDS)
            verdict, error = compare(trained, account, job.model, self._bars), ""
        except (RuntimeError, TimeoutError, ValueError) as failure:
            verdict, error = None, str(failure)
        return Result(case, verdict, error, seed, time.monotonic() - began)

    def _oracle(self, case: Case, seed: int) -> tuple[JobSpec, Account]:
        """The case's job at a seed that serves, and the oracle's account, which equal families of layouts share."""
        job = case.job
        cluster = job.cluster.model_copy(update={"device": self._device})
        job = job.model_copy(update={"cluster": cluster, "train": job.train.model_copy(update={"seed": seed})})
        groups = dispatch_groups_of(job)
        key = (case.variant, case.drop, case.packed, None if groups is None else groups.tobytes())
        with self._lock:
            known = self._oracles.get(key)
            mine = known is None
            if known is None:
                known = self._oracles[key] = Future()
        if mine:
            try:
                known.set_result(self._ranks.run(1, settled, job, seconds=SECONDS)[0])
            except BaseException as failure:
                known.set_exception(failure)
        return known.result()
