"""Layouts: their checks, their ranks and groups, and that Megatron-Core sees the same groups."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import InputError
from parallel.layout import ATTENTION_AXES, EXPERT_AXES, Layout, divisors, nearest_divisor

ROOT = Path(__file__).parents[2]

# Groups as Layout names them and as Megatron-Core's rank generators do (attention mesh, expert mesh).
ATTENTION_GROUPS = {
    "tp": "tp",
    "cp": "cp",
    "dp": "dp",
    "pp": "pp",
    "tp cp": "tp-cp",
    "dp cp": "dp-cp",
    "tp dp": "tp-dp",
    "tp dp cp": "tp-dp-cp",
    "tp pp": "tp-pp",
}
EXPERT_GROUPS = {"etp": "tp", "ep": "ep", "edp": "dp", "pp": "pp", "etp ep": "tp-ep", "etp ep pp": "tp-ep-pp"}


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    degree = st.integers(1, 4)
    tp, cp, dp, pp = (draw(degree) for _ in range(4))
    plane = tp * cp * dp
    etp = draw(st.sampled_from(divisors(plane)))
    ep = draw(st.sampled_from(divisors(plane // etp)))
    return Layout(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep)


@settings(deadline=None)
@given(layouts(), st.sampled_from([ATTENTION_AXES, EXPERT_AXES]), st.data())
def test_every_rank_is_in_exactly_one_group(layout: Layout, mesh: tuple[str, ...], data: st.DataObject) -> None:
    axes = data.draw(st.sets(st.sampled_from(mesh), min_size=1))
    groups = layout.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
    size = 1
    for axis in axes:
        size *= layout.degree(axis)
    assert {len(group) for group in groups} == {size}
    for group in groups:  # they differ along `axes` and nowhere else on the mesh
        places = [layout.coordinates(rank) for rank in group]
        assert len({tuple(place[axis] for axis in axes) for place in places}) == size
        assert len({tuple(place[axis] for axis in mesh if axis not in axes) for place in places}) == 1


@settings(deadline=None)
@given(layouts())
def test_coordinates_and_rank_are_inverse(layout: Layout) -> None:
    for rank in range(layout.world):
        at = layout.coordinates(rank)
        assert all(0 <= at[axis] < layout.degree(axis) for axis in at)
        assert layout.rank(**{axis: at[axis] for axis in ATTENTION_AXES}) == rank
        assert layout.rank(**{axis: at[axis] for axis in EXPERT_AXES}) == rank


@settings(deadline=None)
@given(layouts())
def test_both_meshes_cover_the_same_ranks(layout: Layout) -> None:
    assert (
        layout.etp * layout.ep * layout.edp * layout.pp == layout.tp * layout.cp * layout.dp * layout.pp == layout.world
    )


def test_tp_varies_fastest_and_pp_slowest() -> None:
    layout = Layout(tp=2, cp=2, dp=2, pp=2, etp=1, ep=4)
    assert layout.groups("tp")[:2] == [(0, 1), (2, 3)]
    assert layout.groups("ep")[:2] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert layout.groups("pp")[:2] == [(0, 8), (1, 9)]
    assert layout.coordinates(5) == {"tp": 1, "cp": 0, "dp": 1, "pp": 0, "etp": 0, "ep": 1, "edp": 1}


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp": 0}, "layout.tp=0: a degree is a whole number of at least 1; nearest valid: 1"),
        ({"dp": True}, "layout.dp=True: a degree is a whole number of at least 1; nearest valid: 1"),
        ({"vpp": 2}, "layout.vpp=2: virtual stages need pp above 1, pp=1; nearest valid: 1"),
        ({"sp": True}, "layout.sp=True: sequence parallelism needs tp above 1; nearest valid: False"),
        (
            {"tp": 2, "dp": 3, "ep": 4},
            "layout.ep=4: etp*ep=1*4=4 does not divide tp*cp*dp=2*1*3=6; nearest valid: 3",
        ),
        ({"dp": 2, "etp": 4}, "layout.ep=1: etp*ep=4*1=4 does not divide tp*cp*dp=1*1*2=2"),
    ],
)
def test_impossible_layouts_say_the_numbers(degrees: dict[str, int], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Layout(**degrees)
    assert str(caught.value) == message


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is not within 0..3"):
        Layout(tp=2, dp=2).coordinates(rank)


def test_axes_of_two_meshes_do_not_mix() -> None:
    with pytest.raises(ValueError, match="not of one mesh"):
        Layout(tp=2, dp=2, ep=2).groups("tp", "ep")


def test_sequence_parallelism_goes_with_tp() -> None:
    assert Layout(tp=2).sp is True
    assert Layout(dp=2).sp is False


def test_label_shows_what_is_above_one() -> None:
    assert Layout(tp=2, dp=4, ep=2).label == "tp2 dp4 ep2"
    assert Layout().label == "one rank"


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 600))
def test_divisors(number: int, wanted: int) -> None:
    found = divisors(number)
    assert set(found) == {candidate for candidate in range(1, number + 1) if number % candidate == 0}
    assert found == tuple(sorted(found))
    assert all(abs(nearest_divisor(number, wanted) - wanted) <= abs(divisor - wanted) for divisor in found)


def _random_layouts(number: int, seed: int) -> list[Layout]:
    source = random.Random(seed)
    found = []
    while len(found) < number:
        tp, cp, dp, pp = (source.choice((1, 1, 2, 3, 4)) for _ in range(4))
        plane = tp * cp * dp
        etp = source.choice(divisors(plane))
        ep = source.choice(divisors(plane // etp))
        found.append(Layout(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep))
    return found


def test_groups_agree_with_megatrons_rank_generators() -> None:
    """All groups of both meshes, for 100 random layouts."""
    from megatron.core.parallel_state import RankGenerator

    folded = 0
    for layout in _random_layouts(100, seed=5):
        order = "tp-cp-ep-dp-pp"
        attention = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
        expert = RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order=order)
        for generator, names in ((attention, ATTENTION_GROUPS), (expert, EXPERT_GROUPS)):
            for ours, theirs in names.items():
                groups = sorted(tuple(sorted(group)) for group in generator.get_ranks(theirs))
                assert layout.groups(*ours.split()) == groups, (layout, ours)
        folded += layout.etp != layout.tp and layout.ep > 1
    assert folded > 20  # the draw holds layouts whose meshes differ


# Each process stands in for every rank in turn: torch's fake backend makes groups without peers.
_MEGATRON_GROUPS = """
import json, sys
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron.core import parallel_state as mpu

GETTERS = {
    "tp": mpu.get_tensor_model_parallel_group,
    "cp": mpu.get_context_parallel_group,
    "dp": mpu.get_data_parallel_group,
    "pp": mpu.get_pipeline_model_parallel_group,
    "tp cp": mpu.get_tensor_and_context_parallel_group,
    "dp cp": lambda: mpu.get_data_parallel_group(with_context_parallel=True),
    "tp pp": mpu.get_model_parallel_group,
    "etp": mpu.get_expert_tensor_parallel_group,
    "ep": mpu.get_expert_model_parallel_group,
    "edp": mpu.get_expert_data_parallel_group,
    "etp ep": mpu.get_expert_tensor_and_model_parallel_group,
    "etp ep pp": mpu.get_expert_tensor_model_pipeline_parallel_group,
}
found = []
for tp, cp, pp, ep, etp, world, rank in json.load(sys.stdin):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    mpu.initialize_model_parallel(
        tp, pp, context_parallel_size=cp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp,
        create_gloo_process_groups=False,
    )
    found.append({axes: dist.get_process_group_ranks(group()) for axes, group in GETTERS.items()})
    mpu.destroy_model_parallel()
    dist.destroy_process_group()
print(json.dumps(found))
"""


def test_groups_agree_with_megatrons_process_groups() -> None:
    """The groups that `initialize_model_parallel` makes, as two ranks of each of 100 random layouts get them."""
    source = random.Random(7)
    asked = [(layout, source.randrange(layout.world)) for layout in _random_layouts(100, seed=6) for _ in range(2)]
    done = subprocess.run(
        [sys.executable, "-c", _MEGATRON_GROUPS],
        input=json.dumps([(at.tp, at.cp, at.pp, at.ep, at.etp, at.world, rank) for at, rank in asked]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) == len(asked)
    for (layout, rank), answer in zip(asked, answers, strict=True):
        for axes, ranks in answer.items():
            ours = next(group for group in layout.groups(*axes.split()) if rank in group)
            assert ours == tuple(sorted(ranks)), (layout, rank, axes)
