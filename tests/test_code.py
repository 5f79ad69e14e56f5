"""Which code a result depends on, and when an edit means that it has to be made again."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from pipeline.code import closure, code_digest
from pipeline.code_deps import stale_deps, write_deps


@pytest.fixture
def project(tmp_path: Path) -> Path:
    files = {
        "stages/flow.py": "from data.store import read\nfrom models import warp\nimport numpy\n\nrun = read\n",
        "data/store.py": '"""Stores."""\nimport data.errors\n\ndef read(x):\n    """Doc."""\n    return x + 1  # why\n',
        "data/errors.py": "class E(Exception):\n    pass\n",
        "data/unused.py": "",
        "models/warp.py": "def f():\n    from data.page import build\n    return build\n",
        "data/page.py": "def build(): ...\n",
        "data/page.css": "body {}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for package in ("data", "models", "stages"):
        (tmp_path / package / "__init__.py").write_text('"""A package."""\n')
    return tmp_path


def test_the_closure_follows_every_import_and_takes_assets_along(project: Path) -> None:
    assert closure(project, "stages/flow.py") == (
        "data/errors.py",
        "data/page.css",
        "data/page.py",
        "data/store.py",
        "models/warp.py",
        "stages/flow.py",
    )


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("# why", "# another reason", True),
        ('"""Doc."""', '"""Another text."""', True),
        ('"""Stores."""\n', "\n\n", True),
        ("return x + 1", "return (x + 1)", True),
        ("return x + 1", "return x + 2", False),
        ("def read(x)", "def read(x, y=0)", False),
    ],
)
def test_only_edits_that_could_matter_change_the_digest(project: Path, old: str, new: str, same: bool) -> None:
    files = closure(project, "stages/flow.py")
    before = code_digest(project, files)
    store = project / "data/store.py"
    assert old in store.read_text()
    store.write_text(store.read_text().replace(old, new))
    assert (code_digest(project, files) == before) is same


def test_assets_count_byte_for_byte(project: Path) -> None:
    files = closure(project, "stages/flow.py")
    before = code_digest(project, files)
    (project / "data/page.css").write_text("body { }")
    assert code_digest(project, files) != before


def test_dvc_yaml_lists_exactly_the_code_that_stages_import(root: Path) -> None:
    assert stale_deps(root) == {}, "run `clevrcast deps --write`"


def test_stale_deps_are_found_and_mended_keeping_comments(root: Path, tmp_path: Path) -> None:
    for name in ("data", "models", "stages"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (root / "dvc.yaml").read_text()
    assert "data/video.py" in text
    (tmp_path / "dvc.yaml").write_text(text.replace("      - data/video.py\n", "      - data/gone.py\n"))
    stale = stale_deps(tmp_path)
    assert stale["decode"] == (["data/video.py"], ["data/gone.py"])
    assert write_deps(tmp_path) == sorted(stale)
    assert (tmp_path / "dvc.yaml").read_text() == text


def test_imports_go_one_way(root: Path) -> None:
    """data <- models <- stages; pipeline apart; prefect and dvc only where they are allowed."""
    ours = {"data", "models", "stages", "pipeline"}
    allowed = {"data": {"data"}, "models": {"data", "models"}, "pipeline": {"pipeline"}, "stages": ours}
    guarded = {
        "prefect": {"pipeline/orchestrate.py", "pipeline/serve.py", "pipeline/own_server.py"},
        "dvc": {"pipeline/dag.py", "pipeline/torn.py"},
    }
    for package, may in allowed.items():
        for file in (root / package).rglob("*.py"):
            name = file.relative_to(root).as_posix()
            imported = _imported(file)
            assert imported & ours <= may, f"{name} imports {sorted((imported & ours) - may)}"
            for library, where in guarded.items():
                assert library not in imported or name in where, f"{name} imports {library}"


def test_packages_do_nothing_when_imported(root: Path) -> None:
    for package in ("data", "models", "models/predictors", "stages", "pipeline"):
        body = ast.parse((root / package / "__init__.py").read_text()).body
        if package == "stages":  # but for this, and no result depends on it
            assert ast.unparse(body.pop()) == "import pipeline.process"
        assert all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in body), package


def _imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}
