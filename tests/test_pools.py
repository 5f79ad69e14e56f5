"""The templates of the work pools: every placeholder has a variable, and what they make is a job with GPUs."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

KINDS = ("process", "docker", "kubernetes")


def template(root: Path, kind: str) -> dict[str, Any]:
    return json.loads((root / f"pipeline/pools/{kind}.json").read_text())


def filled(body: dict[str, Any], **given: Any) -> Any:
    """The job configuration with variables in place, as a worker fills them in."""
    properties = body["variables"]["properties"]
    values = {name: about.get("default") for name, about in properties.items()} | given

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: fill(inner) for key, inner in node.items()}
        if isinstance(node, list):
            return [fill(inner) for inner in node]
        if isinstance(node, str) and (alone := re.fullmatch(r"\{\{ (\w+) \}\}", node)):
            return values[alone[1]]
        return re.sub(r"\{\{ (\w+) \}\}", lambda m: str(values[m[1]]), node) if isinstance(node, str) else node

    return fill(body["job_configuration"])


@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_and_variables_are_the_same(root: Path, kind: str) -> None:
    body = template(root, kind)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(body["job_configuration"])))
    variables = body["variables"]["properties"]
    assert used == variables.keys()
    assert all(about["description"] for about in variables.values())
    assert set(body["variables"]["required"]) <= variables.keys()


def test_docker_gives_gpus_shared_memory_and_the_checkout(root: Path) -> None:
    job = filled(template(root, "docker"), workspace="/data/clevrcast", gpus=2)
    assert job["command"] == "python -m pipeline.orchestrate"
    assert job["volumes"] == ["/data/clevrcast:/data/clevrcast"]
    made = job["container_create_kwargs"]
    assert made["device_requests"] == [{"driver": "nvidia", "count": 2, "capabilities": [["gpu"]]}]
    assert made["working_dir"] == "/data/clevrcast"
    assert made["shm_size"] == "8g"


def test_kubernetes_gives_gpus_shared_memory_and_the_checkout(root: Path) -> None:
    job = filled(template(root, "kubernetes"), workspace="/data/clevrcast", gpus=4)["job_manifest"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["spec"]["backoffLimit"] == 0, "retries are ours, stage by stage"
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["name"] == "prefect-job", "Prefect's worker insists"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert container["workingDir"] == "/data/clevrcast"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"workspace": "/data/clevrcast", "shared-memory": "/dev/shm"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes.keys() == mounts.keys()
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}


def test_the_image_installs_what_the_project_needs_and_none_of_its_code(root: Path) -> None:
    text = (root / "pipeline/pools/Dockerfile").read_text()
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    made = re.search(r"mkdir -p (.*?) \\", text)
    assert made is not None
    folders = {str(parent) for path in made[1].split() for parent in (Path(path), *Path(path).parents)} - {"."}
    assert folders == {package.replace(".", "/") for package in packages}
    assert "-c constraints.txt" in text
    assert "://" not in text
