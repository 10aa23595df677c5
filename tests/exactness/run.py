"""`make exact`: the matrix against the oracle; prints a line a case and writes one JSON document.

python tests/exactness/run.py                         # the matrix of `make exact`
python tests/exactness/run.py --seed 7                # other layouts, drawn from this seed
python tests/exactness/run.py --device cuda --precision bf16 --largest-world 2
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import random
import sys
import time
from pathlib import Path

from cases import WORLDS, matrix, subset, uncovered
from matrix import Matrix

from jobs.spec import JobSpec
from orchestrator.worker.exactness.verdict import BF16, FP32
from orchestrator.worker.ranks import Ranks
from parallel.capabilities import why_refused


def main() -> int:
    options = _options()
    seed = options.seed
    chosen = [case for case in (subset() if options.subset else matrix(seed)) if case.world <= options.largest_world]
    chosen = [case for case in chosen if all(word in case.name.split() for word in options.only)]
    chosen = [case for case in chosen if why_refused(on(case.job, options.device, options.precision)) is None]
    print(f"{len(chosen)} cases of seed {seed}: `make exact-random SEED={seed}` draws them again", flush=True)
    bars = BF16 if options.precision == "bf16" else FP32
    runner = Matrix(
        Ranks(options.device),
        side_by_side=options.side_by_side,
        device=options.device,
        precision=options.precision,
        bars=bars,
    )
    began = time.monotonic()
    results = []
    try:
        for number, future in enumerate(runner.start(chosen).values(), 1):
            result = future.result()
            results.append(result)
            verdict = "exact " if result.exact else "WRONG "
            print(f"{number:4}/{len(chosen)} {verdict} {result.seconds:6.1f} s  {result}", flush=True)
    except KeyboardInterrupt:
        runner.stop()
    seconds = time.monotonic() - began
    wrong = [result for result in results if not result.exact]
    print(f"{len(results) - len(wrong)} of {len(results)} exact, of {len(chosen)} drawn, in {seconds:.0f} s")
    for result in wrong:
        print(f"WRONG  {result}")
    document = {
        "command": ["python", *sys.argv],
        "seed": seed,
        "device": options.device,
        "precision": options.precision,
        "bars": vars(bars),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "deepspeed")},
        "seconds": round(seconds, 1),
        "drawn": len(chosen),
        "exact": len(results) - len(wrong),
        "refused": {" / ".join(dict.fromkeys(pair)): why[0] for pair, why in uncovered(matrix(seed)).items() if why},
        "cases": [result.as_dict() for result in results],
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if wrong or len(results) < len(chosen) else 0


def on(job: JobSpec, device: str, precision: str) -> JobSpec:
    """The job on another device and in another precision, for which a case is accepted or not."""
    cluster = job.cluster.model_copy(update={"device": device})
    return job.model_copy(update={"cluster": cluster, "train": job.train.model_copy(update={"precision": precision})})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=_seed, default=0, help="of the draw of layouts, or `new`")
    parser.add_argument("--subset", action="store_true", help="the cases of `make test`")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--largest-world", type=int, default=WORLDS[-1], metavar="RANKS")
    parser.add_argument("--side-by-side", type=int, default=2, metavar="CASES")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases whose name has all these words")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def _seed(text: str) -> int:
    return random.SystemRandom().randrange(1_000_000) if text == "new" else int(text)


if __name__ == "__main__":
    sys.exit(main())
