"""The loss plot, read back as pixels: what is drawn, and what of a step that was trained twice."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from orchestrator.control import plot
from orchestrator.control.ledger import HEADINGS

FIRST: list[dict[str, Any]] = [{"step": step, "attempt": 1, "loss": 5 - step / 20} for step in range(1, 41)]
AGAIN: list[dict[str, Any]] = [{"step": step, "attempt": 2, "loss": 5.2 - step / 20} for step in range(31, 51)]


def picture(metrics: list[dict[str, Any]], entropy: float | None = None, restarts: tuple[int, ...] = ()) -> bytes:
    image = io.BytesIO()
    plot.plot_loss(metrics, image, entropy, restarts)
    return image.getvalue()


def pixels(image: bytes, colour: str) -> int:
    wanted = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return int(np.isclose(imread(io.BytesIO(image))[..., :3], wanted, atol=0.01).all(axis=-1).sum())


def test_a_step_that_was_trained_twice_shows_its_latest() -> None:
    kept = [line for line in FIRST if line["step"] <= 30]
    assert picture(FIRST + AGAIN) == picture(kept + AGAIN)
    assert picture(FIRST + AGAIN) != picture(FIRST)


def test_what_is_known_is_drawn_and_what_is_not_is_left_out() -> None:
    validated = [{**line, "validation_loss": line["loss"] + 0.2} if line["step"] % 10 == 0 else line for line in FIRST]
    plain = picture(FIRST)
    assert pixels(plain, plot._TRAINING) > 500
    assert pixels(plain, plot._VALIDATION) == 0
    assert pixels(picture(validated), plot._VALIDATION) > 100
    assert pixels(plain, plot._QUIET) < 50
    assert pixels(picture(FIRST, entropy=3.2), plot._QUIET) > 1000  # a line across
    assert pixels(picture(FIRST, restarts=(20,)), plot._QUIET) < pixels(picture(FIRST, restarts=(20, 30)), plot._QUIET)


def test_a_run_that_never_trained_a_step_is_still_a_picture(tmp_path: Path) -> None:
    plot.plot_loss([], tmp_path / "loss.png", 3.2, [])
    assert imread(tmp_path / "loss.png").shape[:2] == (675, 1200)


def test_a_slow_rank_is_red() -> None:
    image = io.BytesIO()
    slower = [[0.0, 0.0, 0.5, 0.0]] * 10
    plot.plot_ranks([{"step": at, "slower": each} for at, each in enumerate(slower)], image)
    height = imread(io.BytesIO(image.getvalue()))[..., :3]
    red = (height[..., 0] > height[..., 2] + 0.2).sum(axis=1)
    rows = np.flatnonzero(red > 300)  # of a row of pixels, most
    assert len(rows)
    assert rows[0] > 0.4 * len(red)


def test_time_is_drawn_by_its_headings() -> None:
    none = dict.fromkeys(HEADINGS, 0.0)
    samples = [none, none | {"queue": 50.0}, none | {"queue": 50.0, "productive": 100.0}]
    drawn = io.BytesIO()
    plot.plot_ledger(samples, drawn)
    counted = {heading: pixels(drawn.getvalue(), colour) for heading, colour in plot._OF_HEADING.items()}
    assert counted["productive"] / counted["queue"] == pytest.approx(2, rel=0.1)
    assert counted["rework"] < 0.01 * counted["productive"]  # its name's patch alone
