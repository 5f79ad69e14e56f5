"""A checkout of its own with the commands a user would type, and small raw data sets, for tests of whole stages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import psutil
from ruamel.yaml import YAML

from data.clevrer import FPS, FRAMES, HEIGHT, WIDTH, annotation_path, official_split, video_path, write_annotation
from data.physics import simulate
from data.picture import write_video

COPIED = ("data", "models", "stages", "pipeline", "profiles", "dvc.yaml", "params.yaml", ".gitignore", ".dvcignore")


class Workspace:
    """A checkout of its own, with the commands a user would type."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        for name in COPIED:
            put = shutil.copytree if (root / name).is_dir() else shutil.copy
            put(root / name, folder / name)
        (folder / ".dvc").mkdir()
        for name in ("config", ".gitignore"):
            shutil.copy(root / ".dvc" / name, folder / ".dvc" / name)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@example.org",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@example.org",
        }
        self.run("git", "init", "-q")
        self.module("pipeline.cli", "profile", "tiny")
        self.commit("start")

    def at(self, folder: Path) -> Workspace:
        """The same commands in another checkout, which is there."""
        made = copy(self)
        made.folder, made.environment = folder, dict(self.environment)
        return made

    def twin(self, folder: Path) -> Workspace:
        """The same checkout once more, with all that git does not hold."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return self.at(folder)

    def run(self, *command: str, ok: bool = True, **environment: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert (done.returncode == 0) is ok, f"{command}: exit {done.returncode}\n{done.stdout}"
        return done.stdout

    def module(self, *arguments: str, ok: bool = True, **environment: str) -> str:
        return self.run(sys.executable, "-m", *arguments, ok=ok, **environment)

    def dvc(self, *arguments: str, ok: bool = True) -> str:
        return self.module("dvc", *arguments, ok=ok)

    def repro(self, *arguments: str) -> list[str]:
        """Titles of the stages that `dvc repro` ran."""
        lines = self.dvc("repro", *arguments).splitlines()
        return [line.split("'")[1] for line in lines if line.startswith("Running stage")]

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "-m", message)

    def set(self, path: str, value: object) -> None:
        yaml = YAML()
        document = yaml.load(self.folder / "params.yaml")
        node = document
        *parents, last = path.split(".")
        for part in parents:
            node = node[part]
        node[last] = value
        yaml.dump(document, self.folder / "params.yaml")

    def keep_stages(self, *names: str) -> None:
        """Take every other stage out of dvc.yaml."""
        yaml = YAML()
        graph = yaml.load(self.folder / "dvc.yaml")
        for name in [name for name in graph["stages"] if name not in names]:
            del graph["stages"][name]
        yaml.dump(graph, self.folder / "dvc.yaml")

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def digests(self, stage: str) -> dict[str, str]:
        """sha256 of every file of a stage's output."""
        out = self.folder / "artifacts" / stage
        files = sorted(f for f in out.rglob("*") if f.is_file())
        return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    def last_run(self, title: str) -> dict[str, float]:
        return json.loads((self.folder / f".work/runs/{title}.json").read_text())


def at_work(folder: Path) -> list[psutil.Process]:
    """Processes whose current folder it is, without this one."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        dead = process.info["status"] == psutil.STATUS_ZOMBIE
        if process.info["cwd"] == str(folder) and process.pid != os.getpid() and not dead:
            found.append(process)
    return found


def stub_workspace(root: Path, folder: Path, stages: Sequence[str] = ()) -> Workspace:
    """The real graph of the tiny profile, or these of its stages, with stages that take no time, run once."""
    made = Workspace(root, folder)
    shutil.copy(root / "tests/stub_stage.py", folder)
    graph = folder / "dvc.yaml"
    graph.write_text(re.sub(r"python -m stages\.(\w+)", r"python stub_stage.py \1", graph.read_text()))
    if stages:
        made.keep_stages(*stages)
    made.dvc("repro", "-q")
    made.commit("run once")
    return made


def write_source(folder: Path, ids: Iterable[int]) -> Path:
    """A folder in CLEVRER's layout of coloured squares that drift: quick to make, enough for data stages."""
    for video in ids:
        rng = np.random.default_rng(video)
        split = official_split(video)
        squares = rng.integers(0, 255, (HEIGHT // 20, WIDTH // 20, 3), dtype=np.uint8)
        picture = squares.repeat(20, axis=0).repeat(20, axis=1)
        frames = np.stack([np.roll(picture, t // 2, axis=1) for t in range(FRAMES)])
        write_video(folder / video_path(split, video), frames, FPS)
        write_annotation(
            simulate(np.random.default_rng(video), scene_index=video), folder / annotation_path(split, video)
        )
    return folder


def local_workspace(root: Path, folder: Path, source: Path, videos: dict[str, str], per_shard: int) -> Workspace:
    """A workspace of the tiny profile on a folder of raw videos."""
    workspace = Workspace(root, folder)
    workspace.set("acquire.source", "local")
    workspace.set("acquire.root", str(source))
    workspace.set("acquire.videos", videos)
    workspace.set("shards.videos", per_shard)
    workspace.commit("local source")
    return workspace
