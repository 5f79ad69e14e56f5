"""``params.yaml`` as strict, frozen records: one section per stage, unknown keys refused, cross-field checks at once.

Executor, worker count and device are facts of a machine, not parameters: they come from the environment and change no
result. The options of a predictor or a VAE are checked here for their shape only, and by the module that owns them
(``Options`` in its file) when a stage starts, since this layer knows no model.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import ParamsError
from pipeline.sections import Params

__all__ = ["Params", "check_options", "load_params", "parse_params", "read_yaml", "reference"]

REFUSED = ("size", "nfiles")
"""DVC's run cache ignores parameters of these names and would bring back old outputs (treeverse/dvc 10296)."""


def load_params(path: Path) -> Params:
    """Read and check ``params.yaml``.

    Raises:
        ParamsError: naming every key at fault with its value, and the nearest known name of an unknown key.
    """
    return parse_params(read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as plain data, or a `ParamsError` that names file and line."""
    if not path.exists():
        raise ParamsError(f"{path} does not exist", remedy="run the command at the top of a clevrcast checkout")
    try:
        raw = YAML(typ="safe").load(path)
    except YAMLError as error:
        raise ParamsError(f"{path} is not valid YAML: {error}", remedy="mend the line it names") from error
    if not isinstance(raw, dict):
        raise ParamsError(f"{path} holds {type(raw).__name__}, not a mapping", remedy="restore it from git")
    return raw


def parse_params(raw: Mapping[str, Any], name: str = "params.yaml") -> Params:
    """Check plain data against the schema; see `load_params`."""
    for path in _paths(raw):
        if path[-1] in REFUSED:
            raise ParamsError(
                f"{name}: {'.'.join(path)}: the name {path[-1]!r} is refused, DVC's run cache ignores it",
                remedy="give the parameter another name",
            )
    try:
        # Through JSON: strict about types (no "3" for 3) while lists may stand for tuples.
        return Params.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        lines = [_explain(e, raw) for e in error.errors()]
        raise ParamsError(
            f"{name} is wrong:\n" + "\n".join(f"  - {line}" for line in lines),
            remedy="mend these keys; `clevrcast params` lists every one with its range",
        ) from error


Checked = TypeVar("Checked", bound=BaseModel)


def check_options(model: type[Checked], raw: Mapping[str, Any], where: str) -> Checked:
    """Check a block that a module owns against that module's schema, with errors as for ``params.yaml``."""
    try:
        return model.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            path = ".".join(str(part) for part in e["loc"])
            near = difflib.get_close_matches(path, list(model.model_fields), n=1)
            hint = f"; did you mean {near[0]!r}?" if near and e["type"] == "extra_forbidden" else ""
            lines.append(f"  - {where}.{path} = {e['input']!r}: {e['msg']}{hint}")
        raise ParamsError(
            "params.yaml is wrong:\n" + "\n".join(lines), remedy=f"{where} takes {', '.join(model.model_fields)}"
        ) from error


def _paths(node: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(node, Mapping):
        return []
    out = []
    for key, value in node.items():
        out += [(*prefix, str(key)), *_paths(value, (*prefix, str(key)))]
    return out


def _explain(error: Any, raw: Mapping[str, Any]) -> str:
    # pydantic puts the tags of unions and of dictionary keys among the path; what is not in the data is dropped.
    where, node = [], raw
    for part in error["loc"]:
        inside = part in node if isinstance(node, Mapping) else isinstance(node, list) and part in range(len(node))
        if inside:
            where.append(str(part))
            node = node[part]
        elif error["type"] == "missing":
            where.append(str(part))
    path = ".".join(where)
    if error["type"] == "missing":
        return f"{path} is missing"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where[-1], _known(where[:-1]), n=1)
        return f"{path} is not a known key" + (f"; did you mean {near[0]!r}?" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] == "value_error" else f"{path} = {node!r}: {message}"


def _known(where: list[str]) -> list[str]:
    model: Any = Params
    for part in where:
        if isinstance(model, type) and issubclass(model, BaseModel):
            annotation = model.model_fields[part].annotation
            arguments = [a for a in get_args(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
            model = arguments[-1] if arguments else annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def reference() -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every parameter, in the order of the schema."""
    return _describe(Params, "")


def _describe(model: type[BaseModel], where: str) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, info in model.model_fields.items():
        annotation, path = info.annotation, f"{where}{name}"
        within = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if within:
            nested = within[0]
            if get_origin(annotation) is dict:
                path = f"{path}.NAME"
            rows += _describe(nested, f"{path}.")
            continue
        bounds = ", ".join(repr(m) for m in info.metadata if not isinstance(m, str) and not callable(m))
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
        default = "required" if info.is_required() else repr(info.default)
        rows.append((path, f"{kind} {bounds}".strip(), default, info.description or ""))
    return rows
