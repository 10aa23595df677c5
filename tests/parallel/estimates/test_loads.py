"""Loads that a run recorded, as a plan takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.errors import InputError
from parallel.estimates.loads import recorded
from parallel.fssdp import Limits
from parallel.planning.explanation import explain
from parallel.planning.planner import device_of, plan_job

HOT = [900, 100, 100, 100, 100, 100, 100, 100]
EVEN = [200] * 8


def written(folder: Path, *steps: list[list[int]]) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "expert_loads.jsonl"
    lines = [{"step": 10 * at, "loads": dict(enumerate(layers))} for at, layers in enumerate(steps)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_busiest_rank_is_that_of_the_recording(tmp_path: Path) -> None:
    found = recorded(written(tmp_path, [HOT, EVEN], [HOT, EVEN]), 8)
    assert found.busiest(1) == 1
    assert found.busiest(2) == pytest.approx((1200 / 800 + 1) / 2)
    assert found.busiest(8) == pytest.approx((900 / 200 + 1) / 2)


def test_copies_that_the_past_led_to_take_load_off_it(tmp_path: Path) -> None:
    found = recorded(written(tmp_path, *[[HOT, EVEN]] * 7), 8)
    assert found.shared(8, Limits(0, 0)).busiest == found.busiest(8)
    shared = found.shared(8, Limits(2, 4))
    assert shared.busiest < 1.2
    assert 0 < shared.copies <= 8


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (None, "cannot be read"),
        ("", "is empty"),
        ("{", "has no loads"),
        ('{"step": 1}\n', "has no loads"),
        ('{"loads": {"0": [1, 2, 3]}}\n', "is of 3 experts, the model has 8"),
    ],
)
def test_what_is_no_recording_of_this_model_is_refused(tmp_path: Path, text: str | None, rule: str) -> None:
    path = tmp_path / "expert_loads.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=rule):
        recorded(str(path), 8)


def test_a_plan_is_priced_by_what_was_recorded(tmp_path: Path, make_job) -> None:
    fixed = {"dp": 8, "ep": 8, "tp": 1, "pp": 1, "cp": 1, "expert_parallelism": None}
    for loads, way in (([1600] + [100] * 127, "fssdp"), ([100] * 128, "ep")):
        job = make_job("qwen3_30b_a3b", "h200_x8", fixed | {"expert_loads": written(tmp_path / way, *[[loads]] * 7)})
        best = plan_job(job).plans[0]
        assert best.options["expert_parallelism"] == way
        routing = explain(job, best, device_of(job)).routing
        assert routing[-1].load == "recorded"
        assert routing[-1].busiest == pytest.approx(max(sum(loads[:16]) * 8 / sum(loads), 1))
