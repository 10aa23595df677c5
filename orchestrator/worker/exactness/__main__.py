"""One job of `fivefold exact`, on standard input as it was shrunk: JSON lines of how it goes, and the verdict last."""

from __future__ import annotations

import json
import sys
from typing import Any

from jobs.compose import load
from orchestrator.worker.exactness.oracle import settled
from orchestrator.worker.exactness.trial import Trial, train
from orchestrator.worker.exactness.verdict import compare
from orchestrator.worker.ranks import Ranks

SECONDS = 600


def main() -> None:
    job = load(sys.stdin.read(), "standard input")
    ranks = Ranks()
    job, account = ranks.run(1, settled, job, seconds=SECONDS)[0]
    tell(seed=job.train.seed, losses=account.losses, grad_norms=account.grad_norms)
    trained = train(ranks, Trial(job, tell=True), seconds=SECONDS)
    tell(verdict=compare(trained, account, job.model).as_dict())


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
