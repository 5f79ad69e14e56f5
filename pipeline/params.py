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
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import ParamsError

Resolution = Annotated[tuple[int, int], Field(description="height, width in pixels")]
REFUSED = ("size", "nfiles")
"""DVC's run cache ignores parameters of these names and would bring back old outputs (treeverse/dvc 10296)."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Acquire(Section):
    """Where videos come from. ``videos`` assigns ids to splits; `official` takes CLEVRER's own."""

    source: Literal["simulated", "local"]
    root: str | None = None
    """`local`: a folder in CLEVRER's layout."""
    videos: dict[Literal["train", "validation", "test"], str | int] | Literal["official"]
    """Split -> ids such as ``0-8,10``; every listed video must exist, or is quarantined with the reason."""
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Acquire:
        if self.source == "local" and not self.root:
            raise ValueError("acquire.source is local and acquire.root is empty: name the folder")
        if self.source == "simulated" and self.videos == "official":
            raise ValueError(
                "acquire.source is simulated and acquire.videos is official: list the ids to simulate, "
                "for example {train: 0-39, test: 15000-15007}"
            )
        return self


class Shards(Section):
    """How every store is cut: ``videos`` per shard (the unit of work), ``clip`` frames per chunk (the unit of read)."""

    videos: Annotated[int, Field(ge=1, le=1000)]
    clip: Annotated[int, Field(ge=1, le=128)]
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)]


class Decode(Section):
    resolution: Resolution
    stride: Annotated[int, Field(ge=1, le=64)]
    frames: Annotated[int, Field(ge=2, le=128)] = 128
    """Frames of the source video that are used, counted before the stride."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds after which a decoder that hangs is killed, per video."""

    @model_validator(mode="after")
    def _check(self) -> Decode:
        _divisible("decode.resolution", self.resolution, 8)
        if self.frames // self.stride < 2:
            raise ValueError(f"decode.frames {self.frames} at decode.stride {self.stride} leaves fewer than 2 frames")
        return self

    @property
    def steps(self) -> int:
        """Frames kept of each video."""
        return -(-self.frames // self.stride)


class Label(Section):
    resolution: Resolution


class Gate(Section):
    """Static pixels, found by frame difference, get zero flow (RAFT is noisy on textureless background)."""

    enabled: bool
    threshold: Annotated[float, Field(gt=0, le=255)]
    """Grey levels."""
    radius: Annotated[int, Field(ge=0, le=64)]
    """Pixels by which moving regions are grown."""


class Flow(Section):
    teacher: Literal["raft_small", "raft_large", "dis", "scene"]
    resolution: Resolution
    iterations: Annotated[int, Field(ge=1, le=64)]
    precision: Literal["float32", "bfloat16"]
    gate: Gate

    @model_validator(mode="after")
    def _check(self) -> Flow:
        if self.teacher.startswith("raft"):
            _divisible("flow.resolution", self.resolution, 8)
            if min(self.resolution) < 128:
                raise ValueError(
                    f"flow.resolution {list(self.resolution)} has a side below 128, the least that {self.teacher} takes"
                )
        return self


class Occlusion(Section):
    """Forward-backward consistency: thresholds and softness as in `models.occlusion`."""

    relative: Annotated[float, Field(ge=0)]
    absolute: Annotated[float, Field(gt=0)]
    softness: Annotated[float, Field(gt=0)]


class Trainable(Section):
    """``options`` belong to the model, ``training`` to the loop; both are checked by their owners."""

    options: dict[str, Any] = {}
    training: dict[str, Any] = {}
    batch: Annotated[int, Field(ge=1)] = 8
    seed: int = 0


class Vae(Trainable):
    """``batch`` counts single frames."""


class PredictorBlock(Trainable):
    """``batch`` counts clips of ``evaluate.context + horizon`` frames."""

    model: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """The file of `models/predictors/` (several blocks may use one)."""
    horizon: Annotated[int, Field(ge=1)] = 4
    """Predicted frames in the training loss, at most."""


class Evaluate(Section):
    protocol: str
    split: Literal["train", "validation", "test"]
    context: Annotated[int, Field(ge=2)]
    horizon: Annotated[int, Field(ge=1)]
    window_stride: Annotated[int, Field(ge=1)]
    seed: int = 0


class Report(Section):
    examples: Annotated[int, Field(ge=1, le=32)]


class Params(Section):
    """The whole of ``params.yaml``."""

    acquire: Acquire
    shards: Shards
    decode: Decode
    label: Label
    flow: Flow
    occlusion: Occlusion
    vae: dict[Literal["frame"], Vae]
    predictors: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], PredictorBlock]
    evaluate: Evaluate
    report: Report

    @model_validator(mode="after")
    def _check(self) -> Params:
        for name in ("copy_last", "advect"):
            if name not in self.predictors:
                raise ValueError(f"predictors.{name} is missing: every comparison starts from it")
        if self.flow.teacher == "scene" and self.label.resolution != self.flow.resolution:
            raise ValueError(
                f"flow.teacher is scene, which copies the labels: label.resolution {list(self.label.resolution)} "
                f"and flow.resolution {list(self.flow.resolution)} must be equal"
            )
        for name, block in self.predictors.items():
            if self.evaluate.context + block.horizon > self.decode.steps:
                raise ValueError(
                    f"evaluate.context {self.evaluate.context} + predictors.{name}.horizon {block.horizon} is more "
                    f"than the {self.decode.steps} frames that decode keeps"
                )
        window = self.evaluate.context + self.evaluate.horizon
        if window > self.decode.steps:
            raise ValueError(
                f"evaluate.context {self.evaluate.context} + evaluate.horizon {self.evaluate.horizon} = {window} "
                f"frames, decode keeps {self.decode.steps} of each video"
            )
        if isinstance(self.acquire.videos, dict) and self.evaluate.split not in self.acquire.videos:
            raise ValueError(
                f"evaluate.split is {self.evaluate.split}, acquire.videos has only {sorted(self.acquire.videos)}"
            )
        return self


def _divisible(name: str, resolution: tuple[int, int], by: int) -> None:
    bad = [n for n in resolution if n % by or n <= 0]
    if bad:
        near = [max(by, round(n / by) * by) for n in resolution]
        raise ValueError(f"{name} {list(resolution)}: both must be positive multiples of {by}, for example {near}")


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
            remedy="mend these keys; docs/params.md lists every one with its range",
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
