"""``params.yaml`` as strict, frozen records: one section per stage, unknown keys refused, cross-field checks at once.

Executor, worker count and device are facts of a machine, not parameters: they come from the environment and change no
result. The options of a predictor or a VAE are checked here for their shape only, and by the module that owns them
(``Options`` in its file) when a stage starts, since this layer knows no model.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import ParamsError

Resolution = tuple[int, int]
REFUSED = ("size", "nfiles")
"""DVC's run cache ignores parameters of these names and would bring back old outputs (treeverse/dvc 10296)."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Acquire(Section):
    source: Literal["simulated", "local", "clevrer"]
    """Where videos come from: Bullet and our ray caster, a folder, or the official archives."""
    root: str | None = None
    """The folder in CLEVRER's layout, for `local`; relative to the checkout."""
    url: Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")] = "http://data.csail.mit.edu/clevrer"
    """Where the archives are, for `clevrer`: the official address, or a mirror's."""
    videos: dict[Literal["train", "validation", "test"], str | int] | Literal["official"]
    """Split -> ids such as 0-8,10; a listed video that is missing is quarantined. `official`: CLEVRER's own splits."""
    proposals: bool = False
    """Whether to bring the published object proposals too, for `clevrer`; no stage reads them."""
    seed: int = 0
    """Of the simulation; every video has a generator of its own."""

    @model_validator(mode="after")
    def _check(self) -> Acquire:
        if self.source == "local" and not self.root:
            raise ValueError("acquire.source is local and acquire.root is empty: name the folder")
        if self.source == "simulated" and self.videos == "official":
            raise ValueError(
                "acquire.source is simulated and acquire.videos is official: list the ids to simulate, "
                "for example {train: 0-39, test: 15000-15007}"
            )
        if self.proposals and self.source != "clevrer":
            raise ValueError(f"acquire.proposals is true and acquire.source is {self.source}: only clevrer has them")
        return self


class Shards(Section):
    videos: Annotated[int, Field(ge=1, le=1000)]
    """Videos per shard: the unit of work, of writing and of loss at a crash."""
    clip: Annotated[int, Field(ge=1, le=128)]
    """Frames per chunk: the unit of reading."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)]
    """A stage stops when more than this share of its videos is quarantined."""


class Decode(Section):
    resolution: Resolution
    """Height and width at which every model works; multiples of 8."""
    stride: Annotated[int, Field(ge=1, le=64)]
    """Every stride-th frame is kept."""
    frames: Annotated[int, Field(ge=2, le=128)] = 128
    """Frames of the source video that are used, counted before the stride."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds after which a decoder that hangs is killed, per video."""

    @model_validator(mode="after")
    def _check(self) -> Decode:
        _divisible("decode.resolution", self.resolution, 8)
        if self.steps < 2:
            raise ValueError(f"decode.frames {self.frames} at decode.stride {self.stride} leaves fewer than 2 frames")
        return self

    @property
    def steps(self) -> int:
        """Frames kept of each video."""
        return len(range(0, self.frames, self.stride))


class Label(Section):
    resolution: Resolution
    """Height and width at which boxes, masks, true flow and visibility are cast; CLEVRER's own is 320, 480."""


class Gate(Section):
    enabled: bool
    """Objects that stand still, found by frame difference, and the background get zero flow."""
    threshold: Annotated[float, Field(gt=0, le=255)]
    """Grey levels by which a pixel has to change between the frames of a pair to count as moving."""
    contrast: Annotated[float, Field(gt=0, le=255)]
    """Grey levels by which an object differs from the background, the median over the video."""
    radius: Annotated[int, Field(ge=0, le=64)]
    """Pixels of flow.resolution: gaps of twice this are closed; 16 suits 320 rows, 8 suits 160."""


TEACHERS = ("raft_small", "raft_large", "dis", "scene")


class Flow(Section):
    teacher: str
    """raft_small or raft_large (torchvision's weights), dis (OpenCV), scene (the truth from the labels), or
    ptlflow:NAME, a model of ptlflow (sea_raft_s, flowformer_pp, waft_dav2_a2, neuflow2, ...)."""
    weights: str | None = None
    """For ptlflow:NAME, which has no default: the path of a checkpoint (with a slash or a dot in it), the name of a
    published one (such as things), or random (untrained, to try the machinery)."""
    resolution: Resolution
    """Height and width that the teacher sees, decoded from the source video."""
    iterations: Annotated[int, Field(ge=1, le=64)]
    """RAFT's refinements; models of ptlflow make their own number."""
    precision: Literal["float32", "bfloat16"]
    """Arithmetic of the networks; bfloat16 is autocast."""
    compiled: bool = False
    """RAFT's iterations through torch.compile: faster after a first wait, bfloat16 only, needs a compiler."""
    gate: Gate

    @model_validator(mode="after")
    def _check(self) -> Flow:
        ptlflow = re.fullmatch(r"ptlflow:[A-Za-z]\w*", self.teacher) is not None
        if not ptlflow and self.teacher not in TEACHERS:
            near = difflib.get_close_matches(self.teacher, TEACHERS, n=1)
            raise ValueError(
                f"flow.teacher = {self.teacher!r}: it is one of {', '.join(TEACHERS)} or ptlflow:NAME"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if ptlflow and not self.weights:
            raise ValueError(
                f"flow.weights is missing: {self.teacher} needs the path of a checkpoint, the name of a published one "
                "(such as things) or random, which is untrained and only tries the machinery"
            )
        if not ptlflow and self.weights is not None:
            raise ValueError(
                f"flow.weights = {self.weights!r} is for ptlflow:NAME, flow.teacher is {self.teacher}: leave it out"
            )
        if self.compiled and (not self.teacher.startswith("raft") or self.precision != "bfloat16"):
            raise ValueError(
                f"flow.compiled is for raft_small and raft_large in bfloat16, flow.teacher is {self.teacher} and "
                f"flow.precision {self.precision}"
            )
        if self.teacher.startswith("raft") and min(self.resolution) < 128:
            raise ValueError(
                f"flow.resolution {list(self.resolution)} has a side below 128, the least that {self.teacher} takes"
            )
        return self


class Occlusion(Section):
    relative: Annotated[float, Field(ge=0)]
    """alpha1: tolerated mismatch of the two flows as a share of their squared lengths."""
    absolute: Annotated[float, Field(gt=0)]
    """alpha2: tolerated mismatch in squared pixels of flow.resolution."""
    softness: Annotated[float, Field(gt=0)]
    """Width of the sigmoid around the threshold, in tolerances."""


class Trainable(Section):
    options: dict[str, Any] = {}
    """Of the architecture and its losses; checked by the model's own schema."""
    training: dict[str, Any] = {}
    """Of the training loop (steps, learning_rate, ...); checked by its schema."""
    batch: Annotated[int, Field(ge=1)] = 8
    """Frames (VAE) or clips (predictor) per optimiser step."""
    seed: int = 0
    """Of the weights, the order of the data and the noise."""


VaeKey = Literal["frame", "flow"]
"""What an autoencoder encodes."""


class Vae(Trainable):
    architecture: Literal["block", "kl"] = "block"
    """A block transform with small networks, or diffusers' AutoencoderKL."""
    pretrained: str | None = None
    """The folder of a VAE of ours or of diffusers' AutoencoderKL to start from; with training.steps: 0, to use."""


class PredictorBlock(Trainable):
    model: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """The file of models/predictors/ (several blocks may use one)."""
    pretrained: str | None = None
    """A checkpoint folder of the same model whose weights the training starts from; relative to the checkout."""
    frozen: list[str] = []
    """Modules of the model, by name, that keep their pretrained weights."""
    adaptation: dict[str, Any] | None = None
    """Test-time training of the flow head before each window (steps, learning_rate): measured too, beside without."""
    horizon: Annotated[int, Field(ge=1)] = 4
    """Predicted frames in the training loss, at most; the clip adds evaluate.context before them."""

    @model_validator(mode="after")
    def _check(self) -> PredictorBlock:
        if self.frozen and self.pretrained is None:
            raise ValueError(f"frozen is {self.frozen} and pretrained is absent: random weights would never be trained")
        return self


class Evaluate(Section):
    protocol: str
    """Names what the table may be compared with."""
    split: Literal["train", "validation", "test"]
    """Whose videos are predicted."""
    context: Annotated[int, Field(ge=2)]
    """Observed frames of each window."""
    horizon: Annotated[int, Field(ge=1)]
    """Predicted frames of each window."""
    window_stride: Annotated[int, Field(ge=1)]
    """Windows start at multiples of this."""
    seed: int = 0
    """Of the predictors' randomness and of the bootstrap."""
    lpips: str | None = None
    """A file with the state dict of `lpips.LPIPS(net="squeeze")`; without one LPIPS is not measured."""

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if self.split == "train":
            raise ValueError("evaluate.split is train: models would be scored on what they were trained on")
        return self


class Report(Section):
    examples: Annotated[int, Field(ge=1, le=3)]
    """Windows that are shown moving."""


class Params(Section):
    """The whole of ``params.yaml``."""

    acquire: Acquire
    shards: Shards
    decode: Decode
    label: Label
    flow: Flow
    occlusion: Occlusion
    vae: dict[VaeKey, Vae]
    predictors: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], PredictorBlock]
    evaluate: Evaluate
    report: Report

    @model_validator(mode="after")
    def _check(self) -> Params:
        for name, use in (
            ("frame", "its reconstruction is the ceiling of every comparison"),
            ("flow", "stages read it: two_stream works on it"),
        ):
            if name not in self.vae:
                raise ValueError(f"vae.{name} is missing: {use}")
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
        arguments = get_args(annotation)
        nested = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        if not nested and arguments and isinstance(arguments[-1], type) and issubclass(arguments[-1], BaseModel):
            nested, path = arguments[-1], f"{path}.NAME"
        if nested:
            rows += _describe(nested, f"{path}.")
            continue
        bounds = ", ".join(repr(m) for m in info.metadata if not isinstance(m, str) and not callable(m))
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
        default = "required" if info.is_required() else repr(info.default)
        rows.append((path, f"{kind} {bounds}".strip(), default, info.description or ""))
    return rows
