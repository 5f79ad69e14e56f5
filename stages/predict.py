"""A trained predictor on anyone's video: what happens next, and what the video shows then.

    clevrcast predict my_video.mp4
    clevrcast predict holiday/ --predictor two_stream --start 2.5s --horizon 24

Any file that FFmpeg reads, a folder of them, or a folder of pictures, which are the frames of one video in the order
of their names. Of each, ``clip.mp4``, ``strip.png`` and ``prediction.json`` are written. In Python, at the top of the
same workspace:

    from stages.predict import load
    forecast = load("latent_warp").predict("my_video.mp4")
    forecast.save("out")
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.errors import ClevrcastError, WeightsError
from data.footage import Footage, find_videos
from data.framing import FITS
from models.checkpoint import META, load_predictor, read_meta
from models.predictor import find
from pipeline.devices import device
from pipeline.errors import PipelineError
from pipeline.params import load_params
from pipeline.progress import progress
from pipeline.stage import ARTIFACTS
from stages.application import OUT, positive
from stages.forecast import BASELINES, Forecast, Forecaster, Start, start_at
from stages.forecast_files import FILES, summary, writable
from stages.trained import load_vaes

DEFAULT = "latent_warp"
REPORT = ARTIFACTS / "report/metrics.json"


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 if any video could not be predicted, with one message for each."""
    arguments = _parser().parse_args(argv)
    try:
        found = find_videos(arguments.video)
        for other in found.others:
            print(f"passed over, no video: {other.name}")
        forecaster = load(arguments.predictor)
        if arguments.timeout is not None:
            forecaster.reader.worker.timeout = arguments.timeout
        print(f"predictor: {forecaster.key}, {forecaster.chosen}")
        failed = 0
        folders = _folders(arguments, found.videos, forecaster.key)
        with progress("predict", len(folders), "forecasts") as tick:
            for footage, start, folder in folders:
                failed += not _one(forecaster, arguments, footage, start, folder)
                tick(1, footage.name)
    except (ClevrcastError, PipelineError, OSError) as error:
        return _failed(error)
    if failed and len(folders) > 1:
        print(f"{failed} of {len(folders)} forecasts could not be made", file=sys.stderr)
    return 1 if failed else 0


def load(predictor: str | None = None) -> Forecaster:
    """The trained predictor of that name in ``params.yaml``, or the best there is, ready for `Forecaster.predict`.

    Works at the top of a workspace.

    Raises:
        WeightsError: nothing of that name is trained, or nothing at all, or it does not fit its autoencoders.
        ParamsError: there is no ``params.yaml`` here, or it is malformed.
    """
    params = load_params(Path("params.yaml"))
    key, chosen = (predictor, "as asked for") if predictor is not None else choose()
    folder = ARTIFACTS / "train" / key
    if key not in (there := trained()):
        raise WeightsError(
            f"no predictor {key!r} is trained here; there {'are ' + ', '.join(there) if there else 'is none'}",
            remedy="name one of these with --predictor" if there else _TRAIN,
        )
    meta = read_meta(folder)
    made = load_predictor(folder, vaes=load_vaes(find(meta.name)[1]))
    return Forecaster(key, made, meta, params, device=device(), chosen=chosen)


_TRAIN = "`make demo` trains everything on simulated videos; `dvc repro` trains what params.yaml says"


def trained() -> list[str]:
    """Names of the predictors that are trained in this workspace, or need no training."""
    return sorted(file.parent.name for file in (ARTIFACTS / "train").glob(f"*/{META}"))


def choose() -> tuple[str, str]:
    """The learned predictor to use where none is named, and why.

    Raises:
        WeightsError: none is trained, or several are and nothing says which is best.
    """
    learned = [key for key in trained() if read_meta(ARTIFACTS / "train" / key).name not in BASELINES]
    if not learned:
        raise WeightsError(f"no predictor is trained in {(ARTIFACTS / 'train').resolve()}", remedy=_TRAIN)
    skills = _skills()
    ranked = sorted((key for key in learned if key in skills), key=lambda key: -skills[key])
    if ranked:
        return ranked[0], f"the best of {len(ranked)} in {REPORT} (skill {skills[ranked[0]]:.3f})"
    if len(learned) == 1:
        return learned[0], "the only one that is trained"
    if DEFAULT in learned:
        return DEFAULT, f"the default where there is no {REPORT}"
    raise WeightsError(
        f"{', '.join(learned)} are trained and there is no {REPORT} to say which is best",
        remedy="name one with --predictor, or run `dvc repro`",
    )


def _skills() -> dict[str, float]:
    if not REPORT.is_file():
        return {}
    rows = json.loads(REPORT.read_text()).items()
    return {
        name: row["skill"] for name, row in rows if isinstance(row.get("skill"), float) and math.isfinite(row["skill"])
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clevrcast predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("video", type=Path, help="a video, a folder of videos, or a folder of frames as pictures")
    parser.add_argument("--predictor", help="one of params.yaml (default: the learned one with the best skill)")
    parser.add_argument(
        "--start", type=_start, action="append", metavar="FRAME|SECONDSs", help="the first observed frame: 40, or 1.6s;"
        " may be given several times (default 0)",
    )  # fmt: skip
    parser.add_argument("--horizon", type=positive, help="steps to predict (default: evaluate.horizon)")
    parser.add_argument("--fit", choices=FITS, default="crop", help="how other shapes of picture fit (default crop)")
    parser.add_argument("--fps", type=_rate, help="frames per second, whatever the video says; of pictures")
    parser.add_argument("--seed", type=int, default=0, help="of predictors that draw (default 0)")
    parser.add_argument("--timeout", type=_rate, help="seconds that reading may take (default: decode.timeout)")
    parser.add_argument("--out", type=Path, help=f"folder for the files (default below {OUT})")
    return parser


def _start(text: str) -> Start:
    try:
        return start_at(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a frame (40) nor seconds (1.6s)") from None


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def _folders(arguments: argparse.Namespace, videos: Sequence[Footage], key: str) -> list[tuple[Footage, Start, Path]]:
    """Every forecast and where it goes: a folder for each video of several, and in it for each start of several."""
    starts = list(dict.fromkeys(arguments.start or [Start()]))
    stems = [footage.path.stem if not footage.pictures else footage.name for footage in videos]
    places = []
    for footage, stem in zip(videos, stems, strict=True):
        name = stem if stems.count(stem) == 1 else footage.name
        if arguments.video.is_dir() and not footage.pictures:
            folder = (arguments.out or OUT / f"predict-{key}-{arguments.video.resolve().name}") / name
        else:
            folder = arguments.out or OUT / f"predict-{key}-{name}"
        places += [(footage, start, folder / f"from-{start}" if len(starts) > 1 else folder) for start in starts]
    return places


def _one(forecaster: Forecaster, arguments: argparse.Namespace, footage: Footage, start: Start, folder: Path) -> bool:
    """Whether it worked; what went wrong is printed, so that the others are not held up."""
    try:
        writable(folder)
        forecast = forecaster.predict(
            footage, start=start, horizon=arguments.horizon, fit=arguments.fit, fps=arguments.fps, seed=arguments.seed
        )
        for line in _told(forecast):
            print(line)
        forecast.save(folder)
    except (ClevrcastError, PipelineError, OSError) as error:
        _failed(error)
        return False
    print(f"{folder}: {', '.join(FILES)}", flush=True)
    return True


def _failed(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 1


def _told(forecast: Forecast) -> Iterator[str]:
    """What was read, what was done to it, and what came of it."""
    film, about, x = forecast.film, forecast.film.about, len(forecast.observed)
    h, w = forecast.observed.shape[-2:]
    turned = f", turned by {about.turn} degrees" if about.turn else ""
    yield f"{forecast.footage.path}: {about.width}x{about.height}{turned} at {about.rate:.4g} frames/s"
    yield f"  {film.framing.told(h, w)}"
    yield (
        f"  observed: {x} frames from {film.times[0]:.2f} to {film.times[x - 1]:.2f} s, those nearest to every "
        f"{forecast.step_seconds:g} s; predicted: {len(forecast.frames)} to "
        f"{film.start + (x + len(forecast.frames) - 1) * forecast.step_seconds:.2f} s"
    )
    yield from (f"  note: {note}" for note in forecast.notes)
    yield f"  {summary(forecast)}"


if __name__ == "__main__":
    raise SystemExit(main())
