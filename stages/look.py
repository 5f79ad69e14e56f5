"""What any stage made of any video, as a picture or a clip.

    clevrcast inspect flow --video 15000               # the whole video, as H.264
    clevrcast inspect flow --video 15000 --frame 20    # one moment, as PNG
    clevrcast inspect train@latent_warp --out curve.png

It also works while the stage runs, or after it was killed, for the videos whose shard is finished. ``--frame`` counts
stored frames from 0 (of acquire: those of the source; of flow, occlusion, vae@flow and encode@flow: pairs, of which N
leads from frame N to N + 1; of evaluate: steps of the window, the observed ones first).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data.errors import ClevrcastError, EmptyError
from data.files import replace_file
from data.picture import write_png, write_video
from pipeline.errors import PipelineError, WorkspaceError
from pipeline.params import Params, load_params
from stages import data_views, model_views
from stages.application import OUT
from stages.shelf import is_finished, output
from stages.training_curve import course, draw
from stages.view import View


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with one message."""
    parser = argparse.ArgumentParser(
        prog="clevrcast inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", help="for example flow or encode@frame")
    parser.add_argument("--video", type=int, help="its id")
    parser.add_argument("--frame", type=int, help="one moment instead of the whole video")
    parser.add_argument("--out", type=Path, help=f"the file, .png or .mp4 (default below {OUT})")
    arguments = parser.parse_args(argv)
    try:
        look(arguments.stage, arguments.video, arguments.frame, arguments.out)
    except (ClevrcastError, PipelineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def look(title: str, video: int | None, frame: int | None, out: Path | None) -> None:
    """Write the picture or the clip, and print where it is and what is worth knowing about it.

    Raises:
        WorkspaceError: there is no such stage, it has never run, or no video is named where one is needed.
        StoreError, EmptyError: it made nothing of the video, or nothing of this frame.
    """
    params = load_params(Path("params.yaml"))
    stages = _stages(params)
    if title not in stages:
        raise WorkspaceError(f"there is no stage {title!r}", remedy=f"name one of these: {', '.join(stages)}")
    name, *_ = title.split("@")
    if name == "report":
        _report()
        return
    if name == "train":
        found = course(title)
        target = _target(out, title, None, ".png")
        replace_file(target, draw(title, found))
        _say(target, (found.told(),))
        return
    if video is None:
        raise WorkspaceError(f"{title} is looked at video by video", remedy="name one with --video")
    view = stages[title](video, params)
    if frame is None:
        target = _target(out, title, video, ".mp4")
        write_video(target, view.film(), view.fps)
    else:
        target = _target(out, title, video, ".png")
        write_png(target, view.sheet(frame))
    _say(target, view.said)


def _stages(params: Params) -> dict[str, Callable[[int, Params], View]]:
    """Every stage by its title, in the order of the DAG; those without videos are never called."""
    found: dict[str, Callable[[int, Params], View]] = dict(data_views.VIEWS)

    def keyed(name: str, key: str) -> Callable[[int, Params], View]:
        view = model_views.VIEWS[name]
        return lambda video, params: view(key, video, params)

    def none(video: int, params: Params) -> View:
        raise EmptyError("this stage has no videos", remedy="leave --video out")

    found |= {f"{name}@{key}": keyed(name, key) for name in ("vae", "encode") for key in params.vae}
    found |= {f"train@{key}": none for key in params.predictors}
    found |= {f"evaluate@{key}": keyed("evaluate", key) for key in params.predictors}
    return {**found, "report": none}


def _report() -> None:
    page = output("report") / "index.html"
    if not is_finished("report") and not page.exists():
        raise WorkspaceError(f"there is no {page}", remedy="run `dvc repro` first")
    print(f"the report is one page: {page.resolve().as_uri()}")


def _target(out: Path | None, title: str, video: int | None, suffix: str) -> Path:
    if out is not None and out.suffix != suffix:
        raise WorkspaceError(f"--out is {out}; this is a {suffix} file", remedy=f"give a name that ends in {suffix}")
    number = "" if video is None else f"-{video:05d}"
    return out or OUT / f"inspect-{title}{number}{suffix}"


def _say(target: Path, said: Sequence[str]) -> None:
    print(target)
    for sentence in said:
        print(sentence)


if __name__ == "__main__":
    raise SystemExit(main())
