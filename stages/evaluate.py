"""evaluate@KEY: roll one predictor out on every window of the evaluation split and keep additive metric states."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.catalog import Catalog
from data.clevrer import FPS
from data.clips import Clip, ClipSource, Context
from data.errors import EmptyError
from data.manifest import write_json
from data.resize import resize_field, resize_flow
from data.store import Store
from models.adaptation import Adaptable, AdaptationOptions, Adapted
from models.checkpoint import digest, load_predictor, read_meta
from models.evaluation import Evaluation, Networks, Window, evaluate
from models.image_encoder import FrozenViT, build_pretrained
from models.perceptual import load_lpips
from models.predictor import Predictor, find
from models.results import write_results
from models.video_features import load_i3d, load_vjepa
from pipeline.errors import ParamsError
from pipeline.journal import BadItem, Unit
from pipeline.params import check_options
from pipeline.progress import Tick
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.folder import build_folder
from stages.kept import Kept
from stages.trained import load_vaes

TIMINGS = "timings.json"
WEIGHTS = ("lpips", "subject_encoder", "background_encoder", "fvd", "jedi")
"""Parameters that name files: what these hold is what a result depends on."""
LABELS = ("boxes", "presence", "collision")
OBSERVED = {"frames": ARTIFACTS / "decode", "flow_bwd": ARTIFACTS / "flow", "visible": ARTIFACTS / "occlusion"}
"""Where frames and the teacher's view of the context come from."""


def run(job: Job) -> None:
    evaluation, block = job.params.evaluate, job.params.predictors[job.key]
    windows = Windows(job)
    _, kind = find(block.model)
    vaes = load_vaes(kind)
    trained = ARTIFACTS / "train" / job.key
    predictor = load_predictor(trained, vaes=vaes)
    networks = networks_of(job)
    adapted = None
    if block.adaptation is not None:
        where = f"predictors.{job.key}.adaptation"
        options = check_options(AdaptationOptions, block.adaptation, where)
        if not isinstance(predictor, Adaptable):
            raise ParamsError(f"{where} is given and {block.model} has no flow head to adapt", remedy="remove it")
        adapted = Adapted(predictor, options)

    def make(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        def measured(model: Predictor, tick: Tick) -> Evaluation:
            return evaluate(
                model,
                windows.told(tick),
                name=job.key,
                seed=evaluation.seed,
                device=job.device,
                frame_stride=job.params.decode.stride,
                networks=networks,
            )

        result = measured(predictor, tick)
        again = measured(adapted, partial(_beside, tick)) if adapted is not None else None
        write_results(folder, result, seed=evaluation.seed, fps=windows.fps, adapted=again, protocol=protocol_of(job))
        speed = result.speed.frames_per_second if result.speed is not None else None
        write_json(folder / TIMINGS, {"frames_per_second": speed})
        return []

    decode = job.params.decode
    fingerprint = job.fingerprint(
        # The name of a file does not matter: what it holds is among the weights. Options change rollouts of the same
        # weights (how often a diffusion samples).
        [
            evaluation.model_copy(update=dict.fromkeys(WEIGHTS)),
            decode.model_dump(mode="json", exclude={"timeout"}),
            block.adaptation,
            read_meta(trained).options,
        ],
        weights="".join(digest(network) for network in (predictor, *vaes.values(), *networks.modules)),
        modules=[f"models/predictors/{block.model}.py"],
    )
    unit = Unit(windows.source.videos, windows.source.digests(), job.title)
    build_folder(job, unit, make, fingerprint=fingerprint, counted="videos", private=(TIMINGS,))
    job.facts |= json.loads((job.built[0].folder / TIMINGS).read_text())


def _beside(tick: Tick, advance: int = 1, note: str = "") -> None:
    """Shows a second pass over the windows without counting them again."""
    tick(0, f"adapted, {note}")


def protocol_of(job: Job) -> dict[str, Any]:
    """What an evaluation must share with another to be compared with it."""
    given, decode = job.params.evaluate, job.params.decode
    return {
        "name": given.protocol,
        "source": job.params.acquire.source,
        "split": given.split,
        "resolution": list(decode.resolution),
        "stride": decode.stride,
        "resize": decode.resize,
        "context": given.context,
        "horizon": given.horizon,
        "windows": "first without an entry" if decode.no_entry else f"every {given.window_stride}",
        "lpips_net": given.lpips_net if given.lpips else None,
    }


def networks_of(job: Job) -> Networks:
    """The networks of metrics whose weights are given, on this stage's device."""
    given = job.params.evaluate
    encoders = {"subject_consistency": given.subject_encoder, "background_consistency": given.background_encoder}
    films = {"fvd": (load_i3d, given.fvd), "jedi": (load_vjepa, given.jedi)}
    return Networks(
        perceptual=load_lpips(job.root / given.lpips, given.lpips_net).to(job.device) if given.lpips else None,
        encoders={name: _encoder(place).to(job.device) for name, place in encoders.items() if place},
        films={name: load(job.root / path).to(job.device) for name, (load, path) in films.items() if path},
        smoothness=given.smoothness,
    )


def _encoder(place: str) -> FrozenViT:
    encoder = build_pretrained(place)
    assert encoder is not None  # the parameter's pattern leaves small_vit out
    return encoder


class Windows:
    """The evaluation windows of the parameters' protocol, one batch per video, with the truth where it is labelled."""

    def __init__(self, job: Job) -> None:
        evaluation = job.params.evaluate
        self.height, self.width = job.params.decode.resolution
        self.context, self.horizon = evaluation.context, evaluation.horizon
        self.every = evaluation.window_stride
        self.fps = FPS / job.params.decode.stride
        catalog = Catalog.load(ARTIFACTS / "acquire")
        self.kept = Kept(catalog, job.params.decode)
        videos, self.without_window = _with_window(self.kept, catalog.split(evaluation.split))
        self.labels = Store(ARTIFACTS / "label")
        self.source = ClipSource(
            {name: Store(path) for name, path in OBSERVED.items()} | dict.fromkeys(LABELS, self.labels),
            height=self.height,
            width=self.width,
            videos=videos,
            cache_bytes=0,
        )

    def __iter__(self) -> Iterator[Window]:
        for video in self.source.videos:
            yield self.of(video)

    def told(self, tick: Tick) -> Iterator[Window]:
        """The same, counting videos."""
        for window in self:
            yield window
            tick(1, f"video {int(window.video[0])}")

    def of(self, video: int) -> Window:
        """All windows of one video."""
        length = self.context + self.horizon
        places = [place for place in self._places(length) if place[0] == video]
        clip = self.source.clip(places, length)
        frames, flow, visible = (clip.require(name) for name in OBSERVED)
        x = self.context
        return Window(
            video=clip.video,
            start=clip.start,
            context=Context(frames[:, :x], flow[:, : x - 1], visible[:, : x - 1]),
            frames=frames[:, x:],
            **self._truth(clip, video, [start + x for _, start in places]),
        )

    def _places(self, length: int) -> list[tuple[int, int]]:
        if self.kept.decode.no_entry is None:
            return self.source.windows(length, self.every)
        starts = {video: self.kept.window(video) for video in self.source.videos}
        stride = self.kept.decode.stride
        return [(video, start // stride) for video, start in starts.items() if start is not None]

    def _truth(self, clip: Clip, video: int, starts: list[int]) -> dict[str, Any]:
        if video not in self.labels.ids:
            return {}
        h, w, y = self.height, self.width, self.horizon
        foreground, flow, visible = [], [], []
        for start in starts:
            instances = torch.from_numpy(self.labels.read("instances", video, start, start + y))
            foreground.append(resize_field((instances > 0).float()[:, None], h, w)[:, 0])
            # Pair k leads from frame k+1 back to k, so frame `start` is the target of pair start - 1.
            pairs = slice(start - 1, start - 1 + y)
            true_flow = torch.from_numpy(self.labels.read_flow("flow_bwd", video, pairs.start, pairs.stop))
            flow.append(resize_flow(true_flow, h, w))
            true_visible = torch.from_numpy(self.labels.read("visible", video, pairs.start, pairs.stop))
            visible.append(resize_field(true_visible.float()[:, None] / 255, h, w))
        return {
            "foreground": torch.stack(foreground),
            "true_flow_bwd": torch.stack(flow),
            "true_visible": torch.stack(visible),
            **{f"true_{name}": clip.require(name)[:, self.context :] for name in LABELS},
        }


def _with_window(kept: Kept, videos: Sequence[int]) -> tuple[list[int], list[int]]:
    """Videos that have a window, and those that have none.

    Raises:
        EmptyError: none has one.
    """
    has = {video: kept.window(video) is not None for video in videos}
    if not any(has.values()):
        raise EmptyError(
            f"in each of the {len(videos)} videos something comes into view while a window would be predicted",
            remedy="evaluate more videos, or set decode.no_entry to null",
        )
    return [video for video in videos if has[video]], [video for video in videos if not has[video]]


if __name__ == "__main__":
    run_stage("evaluate", run, keyed=True)
