"""What `clevrcast doctor` says of libraries, devices, servers and weights that are broken on purpose."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.optical_flow import raft_large, raft_small

from pipeline.health import devices, packages, server
from pipeline.health.devices import Driver, Gpu, Seen, judged, named
from pipeline.health.server import Answer
from stages import doctor_models
from tests.doctored import bad, change, off, only, small_checkout

GONE = "http://127.0.0.1:1/api"


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    return small_checkout(root, tmp_path / "checkout")


# Packages.


def test_a_package_outside_its_range_and_one_that_is_absent(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "decord":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.18.7" if name == "zarr" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = bad(packages.packages, checkout)
    assert "decord is not installed" in finding.found
    assert "zarr 2.18.7 is not <4,>=3.1.6" in finding.found
    assert finding.remedy == "pip install -c constraints.txt -e ."
    (differs,) = off(packages.tested, checkout)
    assert differs.state == "warning"
    assert "zarr 2.18.7 (3.1.6)" in differs.found


def test_an_extra_that_is_asked_for_and_not_there(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed", lambda name: None if name == "ray" else "1000")
    monkeypatch.setenv("CLEVRCAST_EXECUTOR", "ray")
    assert "pip install -c constraints.txt -e '.[ray]'" in [f.remedy for f in off(packages.extras, checkout)]


@pytest.mark.parametrize(
    ("versions", "said", "remedy"),
    [
        ({"zfpy": "1.0.1", "numcodecs": "0.16.6"}, "zfpy 1.0.1 beside numcodecs 0.16.6", "pip uninstall zfpy"),
        ({"prefect": "3.8.8", "fastapi": "0.151.0"}, "fastapi 0.151.0 beside prefect 3.8.8", "fastapi"),
        ({"torch": "2.14.1+cpu", "torchvision": "0.29.1"}, "torch 2.14.1+cpu (CPU only)", "torch torchvision"),
    ],
)
def test_packages_that_do_not_work_together(versions: dict[str, str], said: str, remedy: str) -> None:
    (finding,) = packages.known_conflicts(versions)
    assert finding.state == "bad"
    assert said in finding.found
    assert remedy in finding.remedy


def test_packages_that_work_together() -> None:
    fine = {"numcodecs": "0.16.6", "prefect": "3.8.8", "fastapi": "0.150.0", "torch": "2.14.1", "torchvision": "0.29.1"}
    assert list(packages.known_conflicts(fine)) == []


def test_another_python_and_an_old_one(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "bin/python"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho \"['torch']\"\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}:/usr/bin:/bin")
    finding = bad(packages.python, checkout)
    assert f"DVC would start stages with {other}" in finding.found
    assert "lacks ['torch']" in finding.found
    assert finding.remedy == f"source {Path(sys.prefix) / 'bin/activate'}"
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.9.1")
    assert off(packages.python, checkout)[0].remedy == "make PYTHON=/path/to/python3.11 install"


# Devices.


H100 = Gpu("H100", 79e9, 80e9, True)
SMI = Driver("535.1", ("H100",))


@pytest.mark.parametrize(
    ("torch", "smi", "environment", "state", "said", "remedy"),
    [
        (Seen("2", "13.0", (H100,)), SMI, {}, "good", "cuda:0 H100, 79.0 of 80.0 GB free, bfloat16", ""),
        (Seen("2", "13.0", (), "too old"), SMI, {}, "bad", "driver 535.1), PyTorch 2 sees none: too old", "CUDA 13.0"),
        (Seen("2+cpu", "", ()), SMI, {}, "bad", "2+cpu is a build without CUDA", "pip install --force-reinstall"),
        (Seen("2", "13.0", ()), SMI, {"CUDA_VISIBLE_DEVICES": ""}, "warning", "hides", "unset CUDA_VISIBLE_DEVICES"),
        (Seen("2", "13.0", ()), SMI, {"CLEVRCAST_DEVICE": "cpu"}, "good", "leaves them alone", ""),
        (Seen("2", "13.0", ()), Driver("", (), "version mismatch"), {}, "bad", "version mismatch", "reboot"),
        (Seen("2", "13.0", (Gpu("T4", 1e9, 16e9, False),)), SMI, {}, "warning", "no bfloat16", "nvidia-smi"),
        (Seen("2", "13.0", (Gpu("K80", 1e9, 2e9, False, "no kernel"),)), SMI, {}, "bad", "no kernel", "CLEVRCAST_GPUS"),
    ],
)
def test_what_pytorch_sees_beside_the_driver(
    torch: Seen, smi: Driver, environment: dict[str, str], state: str, said: str, remedy: str
) -> None:
    (finding,) = judged(torch, smi, environment)
    assert finding.state == state
    assert said in finding.found
    assert remedy in finding.remedy
    assert finding.remedy or state == "good"


@pytest.mark.parametrize("flags", ["amx_bf16", "sse"])
def test_without_a_gpu(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_bfloat16", lambda: flags == "amx_bf16")
    (finding,) = judged(Seen("2", "13.0", ()), None, {})
    assert finding.state == ("good" if flags == "amx_bf16" else "warning")


def test_nvidia_smi_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '570.1, NVIDIA H100'\necho '570.1, NVIDIA H100'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert devices.driver() == Driver("570.1", ("NVIDIA H100", "NVIDIA H100"))
    program.write_text("#!/bin/sh\necho Failed to initialize NVML: Driver/library version mismatch\nexit 18\n")
    assert devices.driver() == Driver("", (), "Failed to initialize NVML: Driver/library version mismatch")
    monkeypatch.setenv("PATH", "")
    assert devices.driver() is None


@pytest.mark.parametrize(
    ("environment", "count", "said"),
    [
        (
            {"CLEVRCAST_GPUS": "cuda:0,cuda:3"},
            1,
            "CLEVRCAST_GPUS=cuda:0,cuda:3: cuda:3 is not here; there are cpu, cuda:0",
        ),
        ({"CLEVRCAST_GPUS": "cuda:0,cuda:0"}, 1, "one is named twice"),
        ({"CLEVRCAST_GPUS": "cuda:0, cuda:1"}, 2, " cuda:1 is not here"),
        ({"CLEVRCAST_DEVICE": "cuda"}, 0, "CLEVRCAST_DEVICE=cuda: cuda is not here; there are cpu"),
        ({"CLEVRCAST_DEVICE": "gpu"}, 1, "gpu is not here"),
        ({"CLEVRCAST_DEVICE": "cuda:0,cuda:1"}, 2, "cuda:0,cuda:1 is not here"),
    ],
)
def test_devices_that_do_not_exist(environment: dict[str, str], count: int, said: str) -> None:
    (finding,) = named(environment, count)
    assert finding.state == "bad"
    assert said in finding.found
    assert finding.remedy.startswith("unset CLEVRCAST_")


def test_devices_that_exist() -> None:
    (finding,) = named({"CLEVRCAST_DEVICE": "cpu", "CLEVRCAST_GPUS": "cuda:0,cuda:1"}, 2)
    assert finding.state == "good"


# Servers.


@contextmanager
def answering(answers: dict[str, tuple[int, str]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answers.get(self.path, (404, ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}/api"
        made.shutdown()
        thread.join()


@pytest.fixture
def no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prefect's home, without settings."""
    for name in ("PREFECT_API_URL", "PREFECT_PROFILES_PATH", "PREFECT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    return tmp_path


def test_a_prefect_server_that_does_not_answer(no_profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(server.prefect_server, no_profile).state == "good"
    monkeypatch.setenv("PREFECT_API_URL", GONE)
    finding = bad(server.prefect_server, no_profile)
    assert f"PREFECT_API_URL is {GONE}, which does not answer: " in finding.found
    assert "Connection refused" in finding.found
    assert "prefect server start" in finding.remedy
    assert "unset PREFECT_API_URL" in finding.remedy
    monkeypatch.setenv("PREFECT_API_URL", "127.0.0.1:4200/api")
    assert "no http address" in bad(server.prefect_server, no_profile).found
    monkeypatch.delenv("PREFECT_API_URL")
    (no_profile / "profiles.toml").write_text(f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{GONE}"\n')
    (finding,) = off(server.prefect_server, no_profile)
    assert finding.state == "warning"  # it counts with --prefect only
    assert "prefect config unset PREFECT_API_URL" in finding.remedy


@pytest.mark.parametrize(
    ("answers", "state", "said"),
    [
        (
            {"/api/health": (200, "true"), "/api/admin/version": (200, '"3.8.8"')},
            "good",
            "Prefect 3.8.8, this is 3.8.8",
        ),
        ({"/api/health": (200, "true"), "/api/admin/version": (200, '"3.7.1"')}, "warning", "older than 3.8.8"),
        (
            {"/api/health": (200, "true"), "/api/admin/version": (200, '"2.20.4"')},
            "bad",
            "do not understand each other",
        ),
        ({"/api/health": (200, "true")}, "good", "answers; this is Prefect 3.8.8"),
        ({"/api/health": (401, "")}, "bad", "does not let us in (401)"),
        ({}, "bad", "HTTP 404"),
    ],
)
def test_a_prefect_server_that_answers(
    answers: dict[str, tuple[int, str]], state: str, said: str, no_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "installed", lambda name: "3.8.8")
    with answering(answers) as url:
        monkeypatch.setenv("PREFECT_API_URL", url + "/")
        finding = only(server.prefect_server, no_profile)
    assert finding.state == state
    assert said in finding.found


def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that there is no such name."""
    released = threading.Event()

    def waits(*_: object, **__: object) -> None:
        released.wait(30)
        raise OSError

    monkeypatch.setattr(server, "PATIENCE", 0.2)
    monkeypatch.setattr(server.urllib.request, "urlopen", waits)
    assert server.ask(GONE) == Answer(0, "no answer within 0.2 s")
    released.set()


# Codecs and weights.


def test_codecs_that_work_and_that_do_not(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "8 frames written as H.264 and read back by decord, pyav" in only(doctor_models.codecs, checkout).found
    for answers, state in (
        ({"decord": "it died", "pyav": ""}, "warning"),
        ({"decord": "", "pyav": "it died"}, "bad"),
    ):
        monkeypatch.setattr(doctor_models, "_written_and_read", lambda answers=answers: answers)
        finding = only(doctor_models.codecs, checkout)
        assert finding.state == state
        assert "it died" in finding.found
        assert "av decord" in finding.remedy

    def fails() -> dict[str, str]:
        raise OSError("no libx264")

    monkeypatch.setattr(doctor_models, "_written_and_read", fails)
    assert "no libx264" in bad(doctor_models.codecs, checkout).found


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch.hub keeps files, with none."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    return tmp_path / "torch/hub/checkpoints"


@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
def test_weights_of_raft(checkout: Path, empty_hub: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs none from elsewhere" in only(doctor_models.weights, checkout).found
    change(checkout, "flow.teacher", name)
    monkeypatch.setattr(doctor_models, "ask", lambda url, method: Answer(0, "Network is unreachable"))
    finding = bad(doctor_models.weights, checkout)
    assert f"the weights of {name} are not at {empty_hub}/{name}_C_T_V" in finding.found
    assert "Network is unreachable" in finding.found
    assert "set TORCH_HOME to a folder that has hub/checkpoints/" in finding.remedy
    monkeypatch.setattr(doctor_models, "ask", lambda url, method: Answer(200, ""))
    finding = only(doctor_models.weights, checkout)
    assert finding.state == "warning"
    assert "the stage will download https://" in finding.found
    assert list(empty_hub.iterdir()) == []
    file = empty_hub / finding.found.rsplit("/", 1)[1]
    create = {"raft_small": raft_small, "raft_large": raft_large}[name]
    torch.save(create(weights=None).state_dict(), file)
    whole = file.read_bytes()
    for damaged in (b"half of it", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        finding = bad(doctor_models.weights, checkout)
        assert f"{file} cannot be used as the weights of {name}" in finding.found
        assert finding.remedy == f"rm {file}"
    file.write_bytes(whole)
    finding = only(doctor_models.weights, checkout)
    assert finding.state == "warning"
    assert "are not the published ones" in finding.found


@pytest.mark.parametrize(
    ("changes", "said", "remedy"),
    [
        ({"evaluate.lpips": "lpips.pt"}, "there is no file {}/lpips.pt", "leave the perceptual weights out"),
        (
            {"vae.frame.training.perceptual": 0.1, "vae.frame.training.perceptual_weights": "no.pt"},
            "there is no file {}/no.pt",
            "leave the perceptual weights out",
        ),
        ({"evaluate.fvd": "i3d.pt"}, "evaluate.fvd: there is no file {}/i3d.pt", "docs/evaluation.md"),
        (
            {"evaluate.background_encoder": "clip:.dvc"},
            "evaluate.background_encoder: {}/.dvc has no config.json",
            "choose small_vit",
        ),
        ({"vae.flow.pretrained": "old"}, "{}/old has no config.json, diffusion_pytorch", "leave it out"),
        ({"predictors.two_stream.pretrained": "old"}, "{}/old has no meta.json, model.safe", "leave it out"),
        (
            {"predictors.pixel_warp_lstm.options.encoder": "torchvision:vit_b_16"},
            "predictors.pixel_warp_lstm.options.encoder: the weights are not at",
            "choose small_vit",
        ),
        (
            {"predictors.pixel_warp_lstm.options.encoder": "clip:.dvc"},
            "{}/.dvc has no config.json, preprocessor_config.json, model.safetensors",
            "choose small_vit",
        ),
    ],
)
def test_weights_that_are_missing(
    checkout: Path, empty_hub: Path, changes: dict[str, object], said: str, remedy: str
) -> None:
    for path, value in changes.items():
        change(checkout, path, value)
    finding = bad(doctor_models.weights, checkout)
    assert said.format(checkout) in finding.found
    assert remedy in finding.remedy


def test_an_encoder_of_the_hub(checkout: Path, empty_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    change(checkout, "predictors.pixel_warp_lstm.options.encoder", "clip:nobody/nothing-of-this-name")
    monkeypatch.setattr(doctor_models, "ask", lambda url, method: Answer(404, "not found"))
    assert "nobody/nothing-of-this-name" in bad(doctor_models.weights, checkout).found


def test_a_teacher_of_ptlflow(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(checkout, "flow.teacher", "ptlflow:sea_raft_s")
    change(checkout, "flow.weights", "random")
    monkeypatch.setenv("CLEVRCAST_PTLFLOW_PYTHON", str(tmp_path / "python"))
    assert "cannot be run" in bad(doctor_models.weights, checkout).found
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert f"{python} has no ptlflow" in bad(doctor_models.weights, checkout).found
    python.write_text("#!/bin/sh\n")
    assert "random" in off(doctor_models.weights, checkout)[0].found
    change(checkout, "flow.weights", "./no.ckpt")
    assert "there is no file" in bad(doctor_models.weights, checkout).found


def test_weights_say_nothing_of_wrong_parameters(checkout: Path) -> None:
    change(checkout, "flow.teacher", "raft_smal")
    assert list(doctor_models.weights(checkout)) == []
