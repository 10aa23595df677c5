"""From names and overrides to a spec: what is shipped composes, and what cannot be used is told by its path."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

from jobs.compose import CONF, GROUPS, amend, choices, compose, job_names, keys, load
from jobs.errors import CombinedInputError, InputError
from jobs.spec import JobSpec
from parallel.planning.planner import plan_job, resolve

OWN = """
defaults:
  - model: quickstart
  - cluster: laptop
  - data: stdlib
  - layout: auto
  - train: quickstart
  - checkpoint: default
  - policy: default
  - _self_
name: mine
train:
  steps: 30
"""


def refusals(error: InputError) -> list[tuple[str, object]]:
    """(path, nearest) of each."""
    errors = error.errors if isinstance(error, CombinedInputError) else [error]
    return [(each.path, each.nearest) for each in errors]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's own job file, in a folder whose name hydra's grammar would trip over."""
    folder = tmp_path / "my jobs (v2)=new, all"
    folder.mkdir()
    (folder / "mine.yaml").write_text(OWN)
    return folder


@cache
def shipped(name: str) -> JobSpec:
    """Composing takes a tenth of a second; amending what was composed goes the same way from there."""
    return compose(name)


# What is shipped.


@pytest.mark.parametrize("name", job_names())
def test_every_shipped_job_composes_under_its_own_name(name: str) -> None:
    assert (shipped(name).name, shipped(name).model.name) == (name, name)


def test_every_file_of_a_group_bears_its_name() -> None:
    for group in ("model", "cluster"):
        for name in choices(group):
            assert yaml.safe_load((CONF / group / f"{name}.yaml").read_text())["name"] == name


@pytest.mark.parametrize("cluster", choices("cluster"))
@pytest.mark.parametrize("name", job_names())
def test_every_job_plans_on_every_cluster_or_is_refused_in_one_message(name: str, cluster: str) -> None:
    job = amend(shipped(name), [f"cluster={cluster}"])
    try:
        planning = plan_job(job)
    except InputError as error:
        planning, refused = None, error
    if planning is not None:
        assert name != "deepseek_v3"
        assert len(resolve(job, planning.plans[0]).layout.degrees) == 7
    elif name == "deepseek_v3":
        assert (refused.path, refused.nearest) == ("model.kv_lora_rank", 0)
        assert "multi-latent attention" in str(refused)
    else:  # too large: how many nodes would hold it, if any number of this cluster's does
        assert refused.path == "cluster.nodes" or (refused.path, refused.nearest) == ("cluster", None)
        assert "GiB a device" in refused.rule
        assert len(str(refused).splitlines()) == 1


@pytest.mark.parametrize("name", ["quickstart", "mixtral_8x7b"])
def test_a_saved_job_is_the_same_job(name: str) -> None:
    job = amend(shipped(name), ["fault.kill_rank=1", "data.files=[a.txt, b.txt]"])
    assert load(job.model_dump_json(), "job.json") == job


def test_the_schema_accepts_saved_jobs_and_refuses_what_the_spec_refuses() -> None:
    schema = JobSpec.model_json_schema()
    saved = shipped("quickstart").model_dump(mode="json")
    validator = jsonschema.Draft202012Validator(schema)
    assert list(validator.iter_errors(saved)) == []
    for changed in ({"stpes": 1}, {"steps": 0}, {"precision": "fp8"}):
        assert list(validator.iter_errors(saved | {"train": saved["train"] | changed}))


def test_every_key_can_be_overridden_and_no_other() -> None:
    tree = shipped("quickstart").model_dump(mode="json")
    found = {f"{group}.{leaf}" for group, node in tree.items() if isinstance(node, dict) for leaf in node}
    found |= {name for name, node in tree.items() if not isinstance(node, dict)}
    assert set(keys()) == found


# Overrides.


def test_overrides_of_values_and_of_groups() -> None:
    job = compose("quickstart", ["cluster=h200_x2", "layout.tp=2", "train.learning_rate=1e-2", "model=llama3_8b"])
    assert (job.cluster.name, job.model.name) == ("h200_x2", "llama3_8b")
    assert (job.layout.tp, job.layout.dp, job.train.learning_rate) == (2, None, 1e-2)


@pytest.mark.parametrize("overrides", [["train=pretrain", "train.steps=700"], ["train.steps=700", "train=pretrain"]])
def test_a_value_adjusts_its_group_whichever_is_given_first(overrides: list[str]) -> None:
    assert compose("quickstart", overrides).train.steps == 700
    assert amend(shipped("quickstart"), overrides).train.steps == 700


def test_of_one_key_the_last_value_counts() -> None:
    assert amend(shipped("quickstart"), ["train.steps=70", "train.steps=50"]).train.steps == 50


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("a.txt", ("a.txt",)),
        ("[a.txt, b.txt]", ("a.txt", "b.txt")),
        ("/corpus/date=2026/*.txt", ("/corpus/date=2026/*.txt",)),
        ("**/*.txt", ("**/*.txt",)),
        ("s3://bucket/a b,c.txt", ("s3://bucket/a b,c.txt",)),
        ("stdlib:json/*.py", ("stdlib:json/*.py",)),
    ],
)
def test_files_with_signs_of_their_own(text: str, files: tuple[str, ...]) -> None:
    assert amend(shipped("quickstart"), [f"data.files={text}"]).data.files == files


@pytest.mark.parametrize(
    ("text", "indexed"),
    [
        ("/data/wiki", {"/data/wiki": 1.0}),
        ("{/data/wiki: 0.7, /data/code.v2: 3}", {"/data/wiki": 0.7, "/data/code.v2": 3.0}),
    ],
)
def test_token_files_are_named_with_their_weights(text: str, indexed: dict[str, float]) -> None:
    overrides = ["data=indexed", f"data.indexed={text}"]
    jobs = [amend(shipped("quickstart"), overrides), compose("quickstart", overrides)]
    assert [job.data.indexed for job in jobs] == [indexed, indexed]
    assert [job.data.files for job in jobs] == [None, None]


def test_null_leaves_a_degree_to_the_planner() -> None:
    job = amend(shipped("quickstart"), ["layout.tp=2"])
    assert amend(job, ["layout.tp=null"]).layout.tp is None


@pytest.mark.parametrize(
    ("override", "path", "nearest"),
    [
        ("layout.pt=2", "layout.pt", "layout.tp"),
        ("nodes=2", "nodes", "cluster.nodes"),
        ("train.step=5", "train.step", "train.steps"),
        ("modle=quickstart", "modle", "model"),
        ("xyzzy.q=1", "xyzzy.q", None),
        ("cluster=h100x8", "cluster", "h100_x8"),
        ("model=mixtral", "model", "mixtral_8x7b"),
        ("layout=5", "layout", None),
        ("model=", "model", None),
        ("train.steps=abc", "train.steps", None),
        ("train.steps=2.5", "train.steps", None),
        ("train.steps=", "train.steps", None),
        ("train.steps=[1", "train.steps", None),
        ("train.steps=???", "train.steps", None),
        ("train.steps=${oops}", "train.steps", None),
        ("train.steps=0", "train.steps", 1),
        ("train.seed=-1", "train.seed", 0),
        ("layout.tp=0", "layout.tp", 1),
        ("layout.micro_batch=-4", "layout.micro_batch", 1),
        ("cluster.nodes=0", "cluster.nodes", 1),
        ("model.layers=-3", "model.layers", 1),
        ("train.learning_rate=0", "train.learning_rate", None),
        ("train.learning_rate=inf", "train.learning_rate", None),
        ("train.learning_rate=nan", "train.learning_rate", None),
        ("train.adam_beta2=1", "train.adam_beta2", None),
        ("train.precision=fp16", "train.precision", "bf16"),
        ("engine=deepseed", "engine", "deepspeed"),
        ("cluster.device=gpu", "cluster.device", "cpu"),
        ("data.files=[]", "data.files", None),
        ("data.validation_fraction=1", "data.validation_fraction", None),
        ("data=indexed", "data", None),
        ("data.files=", "data", None),
        ("data.indexed=/data/wiki", "data", None),
        ("data.indexed={}", "data.indexed", None),
        ("data.indexed={/data/wiki: -1}", "data.indexed./data/wiki", None),
        ("data.indexed={/data/wiki: 0}", "data.indexed./data/wiki", None),
        ("data.indexed={/data/wiki: .inf}", "data.indexed./data/wiki", None),
        ("name=My Job", "name", None),
        ("fault.at_step=0", "fault.at_step", 1),
        ("train.min_learning_rate=1", "train", None),
        ("model.kv_heads=3", "model", None),
        ("train.steps", "override", None),
        ("=5", "override", None),
        ("Train.Steps=5", "override", None),
    ],
)
def test_a_bad_override_is_told_by_its_path(override: str, path: str, nearest: object) -> None:
    with pytest.raises(InputError) as caught:
        amend(shipped("quickstart"), [override])
    assert refusals(caught.value) == [(path, nearest)]
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("override", ["layout.pt=2", "cluster=h100x8", "train.steps=0", "train.steps=[1", "layout"])
def test_composing_says_the_same_as_amending(override: str) -> None:
    said = []
    for attempt in (lambda: compose("quickstart", [override]), lambda: amend(shipped("quickstart"), [override])):
        with pytest.raises(InputError) as caught:
            attempt()
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_messages_hold_the_value_and_the_numbers() -> None:
    for override, message in {
        "train.steps=0": "train.steps=0: should be greater than or equal to 1; nearest valid: 1",
        "train.min_learning_rate=1": "train: min_learning_rate=1.0 exceeds learning_rate=0.003",
        "model.kv_heads=3": "model: kv_heads=3 does not divide heads=4",
        "engine=deepseed": "engine=deepseed: should be 'megatron' or 'deepspeed'; nearest valid: deepspeed",
        "layout": "override=layout: has the form key=value, like layout.tp=2 or cluster=h200_x8",
    }.items():
        with pytest.raises(InputError) as caught:
            amend(shipped("quickstart"), [override])
        assert str(caught.value) == message


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(CombinedInputError) as caught:
        amend(shipped("quickstart"), ["train.steps=0", "layout.tp=x", "name=Q"])
    assert sorted(refusals(caught.value)) == [("layout.tp", None), ("name", None), ("train.steps", 1)]
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(("job", "nearest"), [("quickstrat", "quickstart"), ("mixtral", "mixtral_8x7b"), ("qq", None)])
def test_an_unknown_job(job: str, nearest: str | None) -> None:
    with pytest.raises(InputError) as caught:
        compose(job)
    assert refusals(caught.value) == [("job", nearest)]
    assert all(name in str(caught.value) for name in job_names())


# A user's own file.


def test_a_users_file_uses_the_shipped_groups(own: Path) -> None:
    job = compose(str(own / "mine.yaml"), ["train.seed=7", "cluster=h200_x2"])
    assert (job.name, job.train.steps, job.train.seed) == ("mine", 30, 7)
    assert (job.model.name, job.cluster.name) == ("quickstart", "h200_x2")


def test_a_users_file_with_groups_of_its_own(own: Path) -> None:
    (own / "model").mkdir()
    small = (CONF / "model" / "quickstart.yaml").read_text().replace("layers: 4", "layers: 2")
    (own / "model" / "small.yaml").write_text(small)
    (own / "mine.yaml").write_text(OWN.replace("model: quickstart", "model: small"))
    assert compose(str(own / "mine.yaml")).model.layers == 2
    assert compose(str(own / "mine.yaml"), ["model=quickstart"]).model.layers == 4
    with pytest.raises(InputError) as caught:
        compose(str(own / "mine.yaml"), ["model=smal"])
    assert refusals(caught.value) == [("model", "small")]
    with pytest.raises(InputError):  # but it is not everybody's
        compose("quickstart", ["model=small"])


def test_a_value_of_a_part_that_the_file_leaves_out(own: Path) -> None:
    assert compose(str(own / "mine.yaml"), ["fault.kill_rank=1"]).fault.kill_rank == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [oops\n", "is not YAML: mine.yaml line 2: expected ',' or ']', but got '<stream end>'"),
        (b"\xff\xfe\x00", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"- a\n- b\n", "primary config 'mine.yaml' must be a DictConfig, got ListConfig"),
        (b"name: ${nobody}\n", "Interpolation key 'nobody' not found"),
        (OWN.replace("model: quickstart", "model: nope").encode(), "In 'mine.yaml': Could not find 'model/nope'"),
        (OWN.replace("name: mine", "name: ???").encode(), "Missing mandatory value: name"),
    ],
)
def test_a_users_file_that_cannot_be_read(own: Path, content: bytes, message: str) -> None:
    (own / "mine.yaml").write_bytes(content)
    with pytest.raises(InputError) as caught:
        compose(str(own / "mine.yaml"))
    assert str(caught.value) == f"{own / 'mine.yaml'}: {message}"


def test_every_key_that_a_users_file_lacks_is_named(own: Path) -> None:
    (own / "mine.yaml").write_text("name: mine\ntrian: {}\ntrain: {steps: 5}\n")
    with pytest.raises(CombinedInputError) as caught:
        compose(str(own / "mine.yaml"))
    groups = [group for group in GROUPS if group != "train"]
    lacking = [*groups, "train.sequence_length", "train.global_batch", "train.learning_rate", "trian"]
    assert sorted(path for path, _ in refusals(caught.value)) == sorted(lacking)
    assert "model: is missing" in str(caught.value)


def test_a_part_that_is_no_mapping(own: Path) -> None:
    (own / "mine.yaml").write_text(OWN.replace("train:\n  steps: 30", "fault: 5"))
    with pytest.raises(InputError) as caught:
        compose(str(own / "mine.yaml"))
    assert refusals(caught.value) == [("fault", None)]


def test_a_file_that_is_not_there_or_not_named_as_one(own: Path) -> None:
    with pytest.raises(InputError) as caught:
        compose(str(own / "mien.yaml"))
    assert refusals(caught.value) == [("job", own / "mine.yaml")]
    (own / "mine.yml").write_text(OWN)
    with pytest.raises(InputError) as caught:
        compose(str(own / "mine.yml"))
    assert refusals(caught.value) == [("job", own / "mine.yaml")]
    with pytest.raises(InputError):
        compose(str(own))


# A saved job.


def test_amending_changes_what_it_names_and_nothing_else() -> None:
    job = amend(shipped("quickstart"), ["layout.tp=2"])
    assert amend(job, []) == job
    changed = amend(job, ["train.steps=200", "cluster=h100_x8"])
    assert changed.cluster == shipped("mixtral_8x7b").cluster
    assert changed.train == job.train.model_copy(update={"steps": 200})
    assert changed.model_copy(update={"train": job.train, "cluster": job.cluster}) == job


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null"])
def test_a_saved_job_that_is_none(text: str) -> None:
    with pytest.raises(InputError):
        load(text, "runs/x/job.json")


def test_a_saved_job_of_another_version_names_the_key() -> None:
    saved = shipped("quickstart").model_dump(mode="json")
    saved["train"]["dropout"] = 0.1
    with pytest.raises(InputError) as caught:
        load(json.dumps(saved), "runs/x/job.json")
    assert refusals(caught.value)[0][0] == "train.dropout"
