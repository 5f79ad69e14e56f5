"""Which of our files a stage's result depends on, and a digest of their meaning.

DVC does not know Python's imports: `closure` lists the files that ``dvc.yaml`` has to name (a test compares them).
`code_digest` hashes syntax trees without comments and docstrings, so that editing a comment re-links finished work
while any edit that could change a result recomputes it (docs/adr/002).
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

RESULT_PACKAGES = ("data", "models", "stages")
"""`pipeline` decides what runs when, never what comes out, and is left out of closures and digests."""


def closure(root: Path, entry: str | Path) -> tuple[str, ...]:
    """Files of ours below ``root`` that ``entry`` imports or shows, itself included, as sorted relative paths."""
    pending, found = [Path(entry)], set()
    while pending:
        path = pending.pop()
        if path.as_posix() in found:
            continue
        found.add(path.as_posix())
        found |= {asset.relative_to(root).as_posix() for asset in _assets(root / path)}
        tree = ast.parse((root / path).read_text(), filename=str(path))
        pending += [p for name in _imported(tree) if (p := _resolve(root, name)) is not None]
    return tuple(sorted(found))


def code_digest(root: Path, files: Iterable[str]) -> str:
    """sha256 over the files' syntax trees, without comments, docstrings and layout."""
    total = hashlib.sha256()
    for name in sorted(set(files)):
        if not name.endswith(".py"):
            total.update(f"{name}\0".encode() + (root / name).read_bytes())
            continue
        tree = _strip_docstrings(ast.parse((root / name).read_text(), filename=name))
        total.update(f"{name}\0{ast.dump(tree)}\0".encode())
    return total.hexdigest()


def _assets(module: Path) -> list[Path]:
    """Templates, styles and the like that stand beside a module under its own name (page.py: page.css, page.js)."""
    return [file for file in module.parent.glob(f"{module.stem}.*") if file.suffix != ".py"]


def _imported(tree: ast.AST) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] in RESULT_PACKAGES]


def _resolve(root: Path, name: str) -> Path | None:
    module = Path(*name.split("."))
    for candidate in (module.with_suffix(".py"), module / "__init__.py"):
        if (root / candidate).exists():
            # Package files hold a docstring and nothing else (tests/test_architecture.py).
            return None if candidate.name == "__init__.py" else candidate
    return None


def _strip_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                statement
                for statement in node.body
                if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
            ] or [ast.Pass()]
    return tree
