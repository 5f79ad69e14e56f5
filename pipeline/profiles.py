"""Profiles: overlays that are merged into ``params.yaml``, keeping its comments.

An overlay follows JSON Merge Patch (RFC 7396): mappings merge, anything else replaces, null removes a key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from pipeline.errors import ParamsError
from pipeline.params import parse_params, read_yaml

FOLDER = Path("profiles")


def available(root: Path) -> list[str]:
    """Names of the profiles in ``profiles/``."""
    return sorted(file.stem for file in (root / FOLDER).glob("*.yaml"))


def apply(root: Path, name: str) -> list[str]:
    """Merge ``profiles/<name>.yaml`` into ``params.yaml`` and return one line per changed key.

    The result is checked before anything is written.

    Raises:
        ParamsError: there is no such profile, or the merged parameters are wrong.
    """
    file = root / FOLDER / f"{name}.yaml"
    if not file.exists():
        raise ParamsError(f"there is no profile {name!r}", remedy=f"choose one of {', '.join(available(root))}")
    changes: list[str] = []
    edit(root / "params.yaml", lambda params: merge(params, read_yaml(file), changes), f"profile {name}")
    return changes


def edit(path: Path, change: Callable[[Any], None], what: str) -> None:
    """Let ``change`` alter the parameters in ``path`` in place and write them back with their comments, once they are
    found to be right.

    Raises:
        ParamsError: they are wrong with ``what``; nothing has been written.
    """
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    params = yaml.load(path)
    change(params)
    parse_params(_plain(params), f"{path.name} with {what}")
    temporary = path.with_name(f".{path.name}.new")
    yaml.dump(params, temporary)
    temporary.replace(path)


def merge(target: Any, overlay: Mapping[str, Any], changes: list[str], where: str = "") -> None:
    """Merge ``overlay`` into ``target`` in place, noting ``key: old -> new`` in ``changes``."""
    for key, value in overlay.items():
        path = f"{where}{key}"
        if value is None:
            if key in target:
                changes.append(f"{path}: removed")
                del target[key]
        elif isinstance(value, Mapping):
            if not isinstance(target.get(key), Mapping):
                target[key] = CommentedMap()
            merge(target[key], value, changes, f"{path}.")
        elif target.get(key) != value:
            changes.append(f"{path}: {_plain(target.get(key, '(absent)'))} -> {value}")
            target[key] = value


def _plain(node: Any) -> Any:
    """ruamel's round-trip nodes as plain data."""
    if isinstance(node, Mapping):
        return {str(k): _plain(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(v) for v in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node
