"""The benches of swapped activations, at the size of a CPU: what they compare is there, and foretold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.worker.benches import offload
from orchestrator.worker.engines.cuda_stand_in import install
from orchestrator.worker.ranks import Ranks


def compared(rank: int) -> list[dict[str, Any]]:
    install()
    return list(offload.compare(torch.device("cpu"), 4, 256))


def longest(rank: int) -> list[dict[str, Any]]:
    install()
    return list(offload.longest(torch.device("cpu"), 2, 32, 512, 1 / 4))


def test_each_way_is_told_beside_all_kept_and_its_peak_before_it(ranks: Ranks) -> None:
    (found,) = ranks.run(1, compared)
    kept, again, *swapped = found
    assert [kept["way"], again["way"]] == [offload.KEPT, offload.AGAIN]
    assert [each["way"] for each in swapped][-1] == offload.LEAST
    for each in found:
        assert each["predicted_peak_bytes"] == pytest.approx(each["seconds"]["peak_bytes"], rel=0.03)
    for each in found[1:]:
        expected = each["seconds"]["median"] / kept["seconds"]["median"] - 1
        assert each["beside_kept"]["seconds"] == pytest.approx(expected)
        assert each["beside_kept"]["peak"] < 0
    copied = [each["swapped_bytes"] for each in swapped]
    assert copied == sorted(copied, reverse=True)


def test_without_a_device_both_ways_train_two_units(ranks: Ranks) -> None:
    (found,) = ranks.run(1, longest)
    assert [each["sequence"] for each in found] == [64, 64]
    assert found[1]["times_as_long"] == 1
    assert "times_as_long" not in found[0]


def test_a_peak_that_cannot_be_foretold_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    told = offload.Forecast(notice="no history")
    monkeypatch.setattr(offload, "rehearse", lambda *_: told)
    for name in ("set_up", "way", "free"):
        monkeypatch.setattr(offload, name, lambda *_: offload.Trained(print, print, None))
    with pytest.raises(RuntimeError, match="64 tokens cannot be foretold: no history"):
        offload._peak_foretold(torch.device("cpu"), 1, 64, "none", swaps=False)
