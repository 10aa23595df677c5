"""What a rank does, read by another process."""

from __future__ import annotations

import multiprocessing
import os
import time

from orchestrator.pulse import Beat, Pulse, Pulses, new_page


def test_a_page_tells_what_was_written_last() -> None:
    page = new_page()
    reader = Pulses(page)
    assert reader.read() is None
    pulse = Pulse(page)
    began = time.monotonic()
    pulse.enter("compute", 7)
    pulse.collective("all_reduce " + "x" * 80)
    beat = reader.read()
    assert beat is not None
    assert (beat.step, beat.phase, beat.collectives, beat.in_collective) == (7, "compute", 1, True)
    assert beat.collective == ("all_reduce " + "x" * 80)[:64]
    assert began <= beat.since <= beat.collective_since <= time.monotonic()
    pulse.collective_ended()
    pulse.enter("agree")
    beat = reader.read()
    assert beat is not None
    assert (beat.step, beat.phase, beat.in_collective) == (7, "agree", False)


def test_every_phase_is_told_however_seldom_somebody_looks() -> None:
    page = new_page()
    reader, pulse = Pulses(page), Pulse(page)
    for step in range(1, 41):
        pulse.enter("data", step)
        pulse.enter("compute")
    beat = reader.read()
    assert beat is not None
    assert [phase for phase, _ in beat.over] == ["start", *(["data", "compute"] * 40)[:-1]]
    assert all(0 <= seconds < 1 for _, seconds in beat.over)
    beat = reader.read()
    assert beat is not None
    assert beat.over == ()
    for step in range(1000):
        pulse.enter("data", step)
        pulse.enter("compute")
    beat = reader.read()
    assert beat is not None
    assert len(beat.over) == 255


def _beat_for_ever(page: int) -> None:
    pulse = Pulse(page)
    step = 0
    while True:
        step += 1
        pulse.enter("compute", step)
        pulse.collective(f"all_reduce {step}")


def test_a_reading_is_never_of_two_beats() -> None:
    page = new_page()
    writer = multiprocessing.get_context("fork").Process(target=_beat_for_ever, args=(page,), daemon=True)
    writer.start()
    reader = Pulses(page)
    seen: list[Beat] = []
    while len(seen) < 2000:
        beat = reader.read()
        if beat is not None:
            seen.append(beat)
    os.kill(writer.pid or 0, 9)
    writer.join()
    named = [beat for beat in seen if beat.in_collective and beat.collective]
    # A step is entered before its collective begins, so that the name is of this step or of the one before.
    assert named
    assert all(beat.step - int(beat.collective.split()[1]) in (0, 1) for beat in named)
    assert [beat.step for beat in seen] == sorted(beat.step for beat in seen)
