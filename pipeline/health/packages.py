"""Whether Python and the installed packages are those that the project was made for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.health.checks import INSTALL, Finding, bad, good, listed, one_line, warning

PROJECT = "clevrcast"
TORCH_AGAIN = "pip install --force-reinstall -c constraints.txt torch torchvision"
NEEDED_BY_STAGES = ("torch", "zarr", "pydantic")


def python(root: Path) -> Iterator[Finding]:
    """The version, and whether stages get this very Python: DVC starts them as plain `python`."""
    from packaging.specifiers import SpecifierSet

    version, wanted = platform.python_version(), _project(root).get("requires-python", ">=3.11")
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        yield bad(f"Python {version}, {wanted} is needed", "make PYTHON=/path/to/python3.11 install")
    found = shutil.which("python")
    if found is None:
        yield bad("there is no `python` on PATH, which is how DVC starts stages", _activate())
    elif Path(found).parent.resolve() != Path(sys.executable).parent.resolve():
        yield from _other_python(found)
    else:
        yield good(f"Python {version}, {sys.executable}")


def _other_python(found: str) -> Iterator[Finding]:
    program = f"from importlib.util import find_spec; print([n for n in {NEEDED_BY_STAGES} if not find_spec(n)])"
    asked = subprocess.run([found, "-c", program], capture_output=True, text=True, timeout=5, check=False)
    told = f"DVC would start stages with {found}, this is {sys.executable}"
    if asked.returncode or asked.stdout.strip() != "[]":
        lacks = f"lacks {asked.stdout.strip()}" if not asked.returncode else f"fails: {one_line(asked.stderr)}"
        yield bad(f"{told}; that one {lacks}", _activate())
    else:
        yield warning(told, _activate())


def _activate() -> str:
    return f"source {Path(sys.prefix) / 'bin/activate'}"


def command(root: Path) -> Iterator[Finding]:
    """Whether the command `clevrcast` runs the code of this checkout."""
    ask = "import pathlib, pipeline; print(pathlib.Path(pipeline.__file__).parents[1])"
    done = subprocess.run([sys.executable, "-c", ask], cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        yield bad(f"the package {PROJECT} is not installed, so there is no command `clevrcast`", INSTALL)
    elif Path(done.stdout.strip()) == root.resolve():
        yield good("`clevrcast` runs the code of this checkout")
    else:
        yield warning(
            f"`clevrcast` runs the code of {done.stdout.strip()}, stages that of {root.resolve()}",
            f"{INSTALL}, or `python -m pipeline.cli` instead of `clevrcast`",
        )


def packages(root: Path) -> Iterator[Finding]:
    """Every direct dependency, installed and in its range."""
    wanted = requirements(root).get("", [])
    wrong = [text for requirement in wanted if (text := _misfit(requirement))]
    if wrong:
        yield bad("; ".join(wrong), "pip install -c constraints.txt -e .")
    else:
        yield good(f"{len(wanted)} direct dependencies are installed, each in its range")


def tested(root: Path) -> Iterator[Finding]:
    """Installed packages of other versions than the tests were made with."""
    from packaging.version import InvalidVersion, Version

    file = root / "constraints.txt"
    if not file.exists():
        yield good("there is no constraints.txt to compare versions with")
        return
    pins = [line.strip().split("==") for line in file.read_text().splitlines() if "==" in line]
    others = []
    for name, pin in pins:
        version = installed(name)
        try:
            same = version is None or Version(version).public == Version(pin).public
        except InvalidVersion:
            same = version == pin
        if not same:
            others.append(f"{name} {version} ({pin})")
    if others:
        found = f"{len(others)} of {len(pins)} packages are not of the tested version (in brackets): {listed(others)}"
        yield warning(found, INSTALL)
    else:
        yield good("every package of constraints.txt that is installed is of the tested version")


def extras(root: Path) -> Iterator[Finding]:
    """Optional parts: there, not there, or asked for and not there."""
    parts = []
    for extra, wanted in requirements(root).items():
        if not extra:
            continue
        absent = [r.name for r in wanted if installed(r.name) is None]
        parts.append(f"{extra} {'is there' if not absent else 'lacks ' + listed(absent)}")
        outside = [text for r in wanted if r.name not in absent and (text := _misfit(r))]
        if outside:
            yield warning(f"{extra}: {'; '.join(outside)}", INSTALL)
        if extra == "ray" and absent and os.environ.get("CLEVRCAST_EXECUTOR") == "ray":
            yield bad("CLEVRCAST_EXECUTOR is ray, which is not installed", "pip install -c constraints.txt -e '.[ray]'")
    yield good(", ".join(parts) or "none is declared")


def conflicts(root: Path) -> Iterator[Finding]:
    """Packages that are known not to work together."""
    names = ("zfpy", "numcodecs", "prefect", "fastapi", "torch", "torchvision")
    found = list(known_conflicts({name: version for name in names if (version := installed(name))}))
    yield from found or [good("no packages that are known not to work together")]


def known_conflicts(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Of the installed packages with these versions."""
    from packaging.version import Version

    numcodecs, prefect, fastapi = (versions.get(name, "") for name in ("numcodecs", "prefect", "fastapi"))
    if "zfpy" in versions and numcodecs == "0.16.6":
        yield bad(
            f"zfpy {versions['zfpy']} beside numcodecs {numcodecs}: importing numcodecs crashes", "pip uninstall zfpy"
        )
    if prefect.startswith("3.8.") and fastapi and Version(fastapi) >= Version("0.151"):
        yield bad(
            f"fastapi {fastapi} beside prefect {prefect}, whose server does not start with it",
            "pip install -c constraints.txt fastapi",
        )
    torch, vision = versions.get("torch", ""), versions.get("torchvision", "")
    if torch.endswith("+cpu") and vision and not vision.endswith("+cpu"):
        yield bad(f"torch {torch} (CPU only) beside torchvision {vision}, which cannot be imported then", TORCH_AGAIN)


def torchvision(root: Path) -> Iterator[Finding]:
    """Whether torch and torchvision load, and an operator that links the two runs."""
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:  # noqa: BLE001 - libraries that do not fit fail in many ways
        yield bad(f"torchvision cannot be used: {type(error).__name__}: {one_line(str(error))}", TORCH_AGAIN)
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield good(f"PyTorch {torch.__version__}, built {built}, and torchvision {torchvision.__version__} work together")


def installed(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(root: Path) -> dict[str, list[Any]]:
    """What the project requires here, by extra ("" are the direct dependencies): of pyproject.toml, or of the installed
    package where the checkout has none."""
    from packaging.requirements import Requirement

    project = _project(root)
    if project:
        texts = {"": project.get("dependencies", []), **project.get("optional-dependencies", {})}
        parsed = {extra: [Requirement(text) for text in lines] for extra, lines in texts.items()}
    else:
        parsed = {
            "": [Requirement(text) for text in importlib.metadata.requires(PROJECT) or [] if "extra ==" not in text]
        }
    return {
        extra: [r for r in each if r.name != PROJECT and (r.marker is None or r.marker.evaluate())]
        for extra, each in parsed.items()
    }


def _misfit(requirement: Any) -> str:
    """In words, "" where it fits."""
    version = installed(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} is not {requirement.specifier}"


def _project(root: Path) -> dict[str, Any]:
    file = root / "pyproject.toml"
    return tomllib.loads(file.read_text())["project"] if file.exists() else {}
