"""The DAG as code knows it: which files of ours each stage of ``dvc.yaml`` has to depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.code import RESULT_PACKAGES, closure

PREDICTORS = Path("models/predictors")


def code_deps(root: Path, stage: str) -> list[str]:
    """The files that stage's module imports, sorted, as ``dvc.yaml`` has to list them.

    A stage that builds predictors by name depends on what any of them imports; the predictor's own file is named by
    the stage's template (``models/predictors/${item.model}.py``), so that a new predictor touches no other's stages.
    """
    files = set(closure(root, f"stages/{stage}.py"))
    if "models/predictor.py" in files and stage in ("train", "evaluate"):
        for predictor in (root / PREDICTORS).glob("[!_]*.py"):
            files |= set(closure(root, predictor.relative_to(root)))
    return sorted(f for f in files if Path(f).parent != PREDICTORS)


def stale_deps(root: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Stage -> (code files that ``dvc.yaml`` lacks, files that it lists in vain), for stages where any differ."""
    out = {}
    for name, body in _stages(_load(root)).items():
        listed, needed = set(_code(body["deps"])), set(code_deps(root, name))
        if listed != needed:
            out[name] = (sorted(needed - listed), sorted(listed - needed))
    return out


def write_deps(root: Path) -> list[str]:
    """Bring the code files among the deps of ``dvc.yaml`` up to date, keeping comments; returns the changed stages."""
    changed = sorted(stale_deps(root))
    document = _load(root)
    for name, body in _stages(document).items():
        kept = [dep for dep in body["deps"] if dep not in _code(body["deps"])]
        body["deps"][:] = [*code_deps(root, name), *kept]
    if changed:
        _yaml().dump(document, root / "dvc.yaml")
    return changed


def _code(deps: list[str]) -> list[str]:
    return [dep for dep in deps if dep.split("/")[0] in RESULT_PACKAGES and "${" not in dep]


def _stages(document: Any) -> dict[str, Any]:
    return {name: body.get("do", body) for name, body in document["stages"].items()}


def _load(root: Path) -> Any:
    return _yaml().load(root / "dvc.yaml")


def _yaml() -> YAML:
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 120
    return yaml
