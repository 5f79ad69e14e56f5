"""What a forecast leaves behind: ``clip.mp4``, ``strip.png`` and ``prediction.json``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from data.files import file_digest, replace_file
from data.picture import error_picture, panel, to_uint8, write_png, write_video
from pipeline.errors import WorkspaceError

if TYPE_CHECKING:
    from stages.forecast import Forecast

FILES = ("clip.mp4", "strip.png", "prediction.json")
CLIP_FPS = 6
MOMENTS = 6
PRESENT = 0.5
"""A box is drawn from this presence on."""
_PAPER, _BOX = 250, (255, 220, 40)
_LIBRARIES = ("clevrcast", "torch", "av", "opencv-python", "numpy")

Picture = np.ndarray


def save(forecast: Forecast, folder: Path) -> None:
    """Write the three files. Raises WorkspaceError if the folder cannot be written."""
    writable(folder)
    body = json.dumps(describe(forecast), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        write_video(folder / "clip.mp4", np.stack(_film(forecast)), CLIP_FPS)
        write_png(folder / "strip.png", _strip(forecast))
        replace_file(folder / "prediction.json", (body + "\n").encode())
    except OSError as error:
        raise _unwritable(folder, error) from error


def writable(folder: Path) -> None:
    """Try to make and write the folder, before hours of work, leaving nothing behind. Raises WorkspaceError."""
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
        for place in absent:
            place.rmdir()
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> WorkspaceError:
    return WorkspaceError(
        f"{folder} cannot be written ({error.strerror})",
        remedy="name another folder with --out, or make this one yours",
    )


def describe(forecast: Forecast) -> dict[str, Any]:
    """``prediction.json``: what was read, what was done to it, by what, and every step. Without NaN: null."""
    film, about, framing = forecast.film, forecast.film.about, forecast.film.framing
    x, step = len(forecast.observed), forecast.step_seconds
    h, w = forecast.observed.shape[-2:]
    scene = film.pictures[forecast.params.flow.resolution]
    return _plain(
        {
            "video": {
                "path": str(forecast.footage.path),
                "sha256": _digest(forecast),
                "container": about.container,
                "codec": about.codec,
                "width": framing.width,
                "height": framing.height,
                "rotation": about.turn,
                "pixel_aspect": about.pixel_aspect,
                "frames_per_second": about.rate,
                "frames": about.frames,
                "duration_seconds": about.duration if about.duration is not None else about.end,
                "damage": film.damage,
            },
            "taken": {
                "start_seconds": film.start,
                "observed_seconds": [film.times[k] for k in range(x)],
                "fit": forecast.fit,
                "shown": framing.told(h, w),
                "crop": dict(zip(("x", "y", "width", "height"), framing.crop, strict=True)),
                "cut": framing.cut,
                "background": {
                    "frames": len(scene),
                    "from_seconds": film.times[min(scene)],
                    "to_seconds": film.times[max(scene)],
                },
                "notes": list(forecast.notes),
            },
            "model": {
                "predictor": forecast.key,
                "chosen": forecast.chosen,
                "kind": forecast.meta.name,
                "weights_digest": forecast.meta.weights_digest,
                "vae_digests": forecast.meta.vae_digests,
                "trained_steps": forecast.meta.steps,
                "seed": forecast.seed,
                "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
            },
            "protocol": {
                "context": x,
                "horizon": len(forecast.frames),
                "frame_stride": forecast.params.decode.stride,
                "seconds_per_step": step,
                "height": h,
                "width": w,
                "flow": forecast.params.flow.model_dump(mode="json"),
                "occlusion": forecast.params.occlusion.model_dump(mode="json"),
            },
            "mean": _scores({name: [_mean(values)] for name, values in forecast.errors.items()}, 0),
            "steps": [_step(forecast, k) for k in range(len(forecast.frames))],
        }
    )


def _step(forecast: Forecast, k: int) -> dict[str, Any]:
    film, x = forecast.film, len(forecast.observed)
    known = k < len(forecast.truth)
    return {
        "step": k + 1,
        "seconds": film.start + (x + k) * forecast.step_seconds,
        "truth_seconds": film.times[x + k] if known else None,
        **_scores(forecast.errors, k),
        "collision": None if forecast.collision is None else float(forecast.collision[k]),
        "boxes": None if forecast.boxes is None else [_box(forecast, k, n) for n in range(forecast.boxes.shape[1])],
    }


def _box(forecast: Forecast, k: int, n: int) -> dict[str, Any]:
    assert forecast.boxes is not None
    h, w = forecast.observed.shape[-2:]
    x0, y0, x1, y1 = (float(edge) for edge in forecast.boxes[k, n])
    return {
        "presence": None if forecast.presence is None else float(forecast.presence[k, n]),
        "model": (x0, y0, x1, y1),
        "video": forecast.film.framing.to_source((x0, y0, x1, y1), h, w),
    }


def _scores(errors: dict[str, list[float]], k: int) -> dict[str, dict[str, float | None]]:
    """Skill over copying the last frame, and PSNR in dB, of one step; None where there is no truth."""
    at = {name: values[k] if k < len(values) else None for name, values in errors.items()}
    copied = at["copy_last"]
    return {
        "skill": {n: None if e is None or not copied else 1 - e / copied for n, e in at.items() if n != "copy_last"},
        "psnr": {n: None if not e else -10 * math.log10(e) for n, e in at.items()},
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def summary(forecast: Forecast) -> str:
    """One line of figures, for the terminal."""
    if not len(forecast.truth):
        return f"{len(forecast.frames)} steps predicted; the video does not show them, so there is nothing to compare"
    scores = _scores({name: [_mean(values)] for name, values in forecast.errors.items()}, 0)
    parts = []
    for name in forecast.errors:
        if name == forecast.key:
            continue  # a baseline was asked for: it is the prediction
        skill, psnr = scores["skill"].get(name), scores["psnr"][name]
        skilled = f", skill {skill:.3f}" if skill is not None else ""
        parts.append(f"{forecast.key if name == 'predicted' else name} {_number(psnr)} dB{skilled}")
    return f"over {len(forecast.truth)} of {len(forecast.frames)} steps: " + "; ".join(parts)


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2f}"


def _plain(value: Any) -> Any:
    """The same with six decimals, and null for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _digest(forecast: Forecast) -> str:
    """sha256 of the file; of a folder of pictures, that of the pictures' digests in order."""
    if not forecast.footage.pictures:
        return file_digest(forecast.footage.path)
    return hashlib.sha256("".join(map(file_digest, forecast.footage.pictures)).encode()).hexdigest()


def _film(forecast: Forecast) -> list[Picture]:
    """Every observed and every predicted frame, beside the truth and the error."""
    observed, predicted, truth = (
        list(to_uint8(part.numpy())) for part in (forecast.observed, forecast.frames, forecast.truth)
    )
    blank = np.full_like(observed[0], _PAPER)
    x, film = len(observed), []
    for k, picture in enumerate(observed):
        label = _time(forecast, k - x + 1)
        columns = [(picture, f"observed, {label}"), (picture, f"{forecast.key} sees it")]
        if truth:
            columns += [(picture, f"video, {label}"), (blank, "error")]
        film.append(_sheet(columns))
    for k, picture in enumerate(predicted):
        label = _time(forecast, k + 1)
        collides = "" if forecast.collision is None else f", collision {100 * float(forecast.collision[k]):.0f} %"
        columns = [(observed[-1], "last observed"), (_boxed(forecast, k, picture), f"predicted, {label}{collides}")]
        if k < len(truth):
            columns += [(truth[k], f"video, {label}"), (error_picture(picture, truth[k]), _error_label(forecast, k))]
        elif truth:
            columns += [(blank, "not in the video"), (blank, "error")]
        film.append(_sheet(columns))
    return film


def _sheet(columns: list[tuple[Picture, str]]) -> Picture:
    return panel([picture for picture, _ in columns], [label for _, label in columns], columns=len(columns), scale=2)


def _strip(forecast: Forecast) -> Picture:
    """The observed frames, then moments of prediction, truth and error below each other."""
    observed, predicted, truth = (
        list(to_uint8(part.numpy())) for part in (forecast.observed, forecast.frames, forecast.truth)
    )
    blank = np.full_like(observed[0], _PAPER)
    moments = sorted(set(np.linspace(0, len(predicted) - 1, min(MOMENTS, len(predicted))).round().astype(int).tolist()))
    shown = [k - len(observed) + 1 for k in range(len(observed))][-len(moments) :]
    cells = [(blank, "")] * (len(moments) - len(shown))
    cells += [(observed[k - 1], f"observed, {_time(forecast, k)}") for k in shown]
    cells += [(_boxed(forecast, k, predicted[k]), f"predicted, {_time(forecast, k + 1)}") for k in moments]
    if truth:
        cells += [
            (truth[k], f"video, {_time(forecast, k + 1)}") if k < len(truth) else (blank, "not in the video")
            for k in moments
        ]
        cells += [
            (error_picture(predicted[k], truth[k]), _error_label(forecast, k)) if k < len(truth) else (blank, "")
            for k in moments
        ]
    return panel([picture for picture, _ in cells], [label for _, label in cells], columns=len(moments), scale=2)


def _time(forecast: Forecast, steps: int) -> str:
    return f"{steps * forecast.step_seconds:+.2f} s"


def _error_label(forecast: Forecast, k: int) -> str:
    skill = _scores(forecast.errors, k)["skill"]["predicted"]
    return "error" if skill is None else f"error, skill {skill:.2f}"


def _boxed(forecast: Forecast, k: int, picture: Picture) -> Picture:
    """The picture with the boxes of what is thought to be there."""
    if forecast.boxes is None:
        return picture
    drawn = picture.copy()
    for n, box in enumerate(forecast.boxes[k].round().int().tolist()):
        if forecast.presence is None or float(forecast.presence[k, n]) >= PRESENT:
            cv2.rectangle(drawn, box[:2], [edge - 1 for edge in box[2:]], _BOX, 1)
    return drawn
