"""Checkpoints of predictors: a folder that rebuilds the model on its own.

``model.safetensors`` holds the weights (without those of borrowed modules), ``meta.json`` everything else, readable:
the predictor's name and options, the sizes it was built for, and the digests of the autoencoders that it worked with.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.errors import WeightsError
from models.autoencoder import LatentVAE, Vaes
from models.predictor import Predictor, build
from models.weights import fit_weights

WEIGHTS, META = "model.safetensors", "meta.json"


class CheckpointMeta(BaseModel):
    """``meta.json``. ``vae_digests`` are those of the autoencoders in use; ``extra`` is the caller's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clevrcast: str
    name: str
    options: dict[str, Any]
    height: int
    width: int
    context: int
    steps: int
    weights_digest: str
    vae_digests: dict[str, str]
    extra: dict[str, Any] = {}


def digest(module: nn.Module) -> str:
    """sha256 over a module's own weights (name, type, shape and bytes of each) and, for a VAE, its configuration."""
    own = module.own_state() if isinstance(module, Predictor) else module.state_dict()
    settings = (
        {k: v for k, v in module.config.items() if not k.startswith("_")} if isinstance(module, LatentVAE) else {}
    )
    return state_digest(own, settings)


def state_digest(state: dict[str, Tensor], settings: dict[str, Any] | None = None) -> str:
    """sha256 over named tensors (name, type, shape and bytes of each) and plain ``settings``."""
    total = hashlib.sha256(json.dumps(settings or {}, sort_keys=True, default=str).encode())
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_checkpoint(
    folder: Path,
    predictor: Predictor,
    *,
    name: str,
    options: dict[str, Any],
    steps: int,
    vaes: Vaes | None = None,
    extra: dict[str, Any] | None = None,
) -> CheckpointMeta:
    """Write ``folder``; ``name`` and ``options`` are those given to `models.predictor.build`.

    The meta file is written last and atomically: a folder that has one is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).unlink(missing_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in predictor.own_state().items()}
    save_file(state, folder / WEIGHTS)
    meta = CheckpointMeta(
        clevrcast=importlib.metadata.version("clevrcast"),
        name=name,
        options=options,
        height=predictor.height,
        width=predictor.width,
        context=predictor.context,
        steps=steps,
        weights_digest=state_digest(state),
        vae_digests={key: digest(vae) for key, vae in sorted((vaes or {}).items()) if key in predictor.needs_vaes},
        extra=extra or {},
    )
    unfinished = folder / (META + ".part")
    unfinished.write_text(meta.model_dump_json(indent=2) + "\n")
    unfinished.replace(folder / META)
    return meta


def read_meta(folder: Path) -> CheckpointMeta:
    """What a checkpoint says about itself. Raises WeightsError if it is absent, unfinished or unreadable."""
    path = folder / META
    if not path.is_file():
        raise WeightsError(f"{folder} holds no finished checkpoint ({META} is absent)", remedy="train the predictor")
    try:
        return CheckpointMeta.model_validate_json(path.read_text())
    except ValidationError as error:
        raise WeightsError(f"{path} is not a checkpoint's meta: {error}", remedy="train the predictor again") from error


def load_predictor(folder: Path, *, vaes: Vaes | None = None) -> Predictor:
    """Rebuild a predictor, in evaluation mode, from its folder and the autoencoders that it was trained with.

    Raises WeightsError, with both digests, if the weights or the VAE are not those of the checkpoint.
    """
    meta = read_meta(folder)
    vaes = vaes or {}
    _check_vaes(folder, meta, vaes)
    predictor = build(meta.name, meta.options, vaes=vaes, height=meta.height, width=meta.width, context=meta.context)
    load_own_state(predictor, _weights(folder, meta))
    return predictor.eval()


def load_pretrained(folder: Path, predictor: Predictor, *, name: str, vaes: Vaes) -> CheckpointMeta:
    """Start ``predictor``, which `models.predictor.build` made as ``name``, from the weights of another run of it.

    Options and sizes may differ as long as no weight's shape does. Raises WeightsError if the checkpoint is of another
    model, does not fit, or learned on the latents of other autoencoders (naming both digests).
    """
    meta = read_meta(folder)
    if meta.name != name:
        raise WeightsError(
            f"{folder} holds {meta.name!r}, this predictor is {name!r}", remedy="name a checkpoint of the same model"
        )
    _check_vaes(folder, meta, vaes)
    load_own_state(predictor, _weights(folder, meta), remedy=f"give it the options of {folder / META}")
    return meta


def load_own_state(
    predictor: Predictor, state: dict[str, Tensor], *, remedy: str = "train the predictor again"
) -> None:
    """Put back what `Predictor.own_state` gave. Raises WeightsError naming what is missing, unknown or misshapen."""
    source = f"the checkpoint of {type(predictor).__name__}"
    fit_weights(predictor.own_state(), state, source=source, remedy=remedy)


def _weights(folder: Path, meta: CheckpointMeta) -> dict[str, Tensor]:
    path, remedy = folder / WEIGHTS, "train the predictor again"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", remedy=remedy) from error
    _compare(str(path), state_digest(state), meta.weights_digest, remedy)
    return state


def _check_vaes(folder: Path, meta: CheckpointMeta, vaes: Vaes) -> None:
    for key, expected in meta.vae_digests.items():
        if key not in vaes:
            raise WeightsError(f"{folder} was trained with the {key} VAE {expected}; none was given", remedy="give it")
        what, remedy = f"the {key} VAE given for {folder}", "give the VAE it was trained with"
        _compare(what, digest(vaes[key]), expected, remedy)


def _compare(what: str, found: str, expected: str, remedy: str) -> None:
    if found != expected:
        raise WeightsError(f"{what} has the digest {found}, expected {expected}", remedy=remedy)
