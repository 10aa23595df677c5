"""Checkpoints that were interrupted or damaged: the newest whole state is resumed from, whatever was changed last."""

from __future__ import annotations

from crashes import attempts


def test_a_training_killed_or_refused_at_any_change_or_damaged_later_resumes_from_what_it_had() -> None:
    found = attempts(range(60))
    assert sum(found.values()) == 60
    kinds = {what.split(",")[0] for what in found}
    assert kinds == {"killed", "refused", "flip", "cut", "delete"}
    assert {what.split(",")[1] for what in found} == {" uploading", " on a disk"}
