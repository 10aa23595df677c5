"""The cluster templates: they parse, name what their tools require, keep the token on, and call verbs that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from orchestrator import cli

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
FILES = sorted(file for file in INFRA.iterdir() if file.is_file())
VERBS = set(cli._parser()[1])
RAY = next(
    requirement.partition("==")[2]
    for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    if requirement.startswith("ray[")
)


def kuberay() -> tuple[dict[str, Any], dict[str, Any]]:
    claim, cluster = yaml.safe_load_all((INFRA / "kuberay.yaml").read_text())
    return claim, cluster["spec"]


def test_the_cluster_file_is_what_rays_launcher_accepts() -> None:
    config = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert {"type", "head_ip", "worker_ips"} <= set(config["provider"])
    assert config["provider"]["type"] == "local"
    assert any("--head" in command for command in config["head_start_ray_commands"])
    assert any("$RAY_HEAD_IP" in command for command in config["worker_start_ray_commands"])


def test_kuberay_shares_the_run_folders_among_all_pods() -> None:
    claim, spec = kuberay()
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        (volume,) = (volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume)
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {"name": volume["name"], "mountPath": "/runs"} in pod["containers"][0]["volumeMounts"]


def test_kuberay_has_one_size_and_the_ray_of_the_image() -> None:
    _, spec = kuberay()
    (workers,) = spec["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]
    assert spec["rayVersion"] == RAY
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"]


def test_the_token_is_on_everywhere() -> None:
    assert kuberay()[1]["authOptions"] == {"mode": "token"}
    assert "ENV RAY_AUTH_MODE=token" in (INFRA / "Dockerfile").read_text()  # and so in the launcher's containers
    assert "export RAY_AUTH_MODE=token" in (INFRA / "slurm.sbatch").read_text()
    for file in FILES:
        assert "disabled" not in file.read_text()


def test_the_slurm_script_is_bash() -> None:
    checked = subprocess.run(["bash", "-n", INFRA / "slurm.sbatch"], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_only_verbs_that_exist_are_called() -> None:
    # A verb stands where a command would: at the start of a line or of a substitution, or after an assignment.
    calls = re.compile(r"(?:^|[$('#]|=\S+) *fivefold ([a-z]+)", re.MULTILINE)
    called = {verb for file in FILES for verb in calls.findall(file.read_text())}
    assert called <= VERBS
    assert {"submit", "logs"} <= called


def test_the_slurm_script_submits_follows_and_cancels() -> None:
    called = re.findall(r"fivefold ([a-z]+) \"\$", (INFRA / "slurm.sbatch").read_text())
    assert called == ["submit", "logs", "cancel", "status"]


def test_the_readme_has_every_template() -> None:
    text = (INFRA / "README.md").read_text()
    for file in FILES:
        assert file.suffix in (".md", ".dockerignore") or f"`{file.name}`" in text
