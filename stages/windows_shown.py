"""The windows that the report shows: films of every predictor, and what they say of motion, boxes and collisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8

from data.chart import Chart, Curve, Kind
from data.clips import Context
from data.page import number
from data.page_content import Clip, Figure, PictureTable, Study, Tile
from data.picture import SURE_BOX, UNSURE_BOX, boxes_picture, flow_legend, flow_picture, occlusion_overlay, to_uint8
from models.evaluation import Evaluation
from models.examples import Example
from models.object_statistics import box_statistics
from models.predictors.advect import Advect, Options
from stages.evaluate import Windows

SHARED_RULES = ("most motion", "most collisions", "median motion", "first")
"""Rules that choose the same window for every predictor, so that all stand side by side."""
OWN_RULES = ("best", "worst")
"""Rules by which a predictor has windows of its own, see `models.examples.Examples`."""
STEPS_SHOWN = 4
WINDOWS_STUDIED = 2
LEAST_SCALE_PX = 2.0
"""The wheel is never scaled below this, or the noise of a static pair would fill it."""


@dataclass(frozen=True)
class Shown:
    """One window: why it is shown, and what each predictor made of it, in the order of the page."""

    rule: str
    examples: dict[str, Example]

    @property
    def any(self) -> Example:
        return next(iter(self.examples.values()))

    @property
    def place(self) -> tuple[int, int]:
        return self.any.video, self.any.start

    @property
    def title(self) -> str:
        return f"{self.rule}: video_{self.any.video:05d}, frame {self.any.start} on"


def shared(results: Sequence[Evaluation]) -> tuple[Shown, ...]:
    """The windows that all predictors kept, each once, by `SHARED_RULES`."""
    found: dict[tuple[int, int], Shown] = {}
    for rule in SHARED_RULES:
        examples = {r.name: e for r in results for e in r.examples if rule in e.rules}
        if examples:
            shown = Shown(rule, examples)
            found.setdefault(shown.place, shown)
    return tuple(found.values())


def extremes(results: Sequence[Evaluation], best: str | None, windows: Windows) -> tuple[Shown, ...]:
    """The best and the worst window of the best learned predictor: it, whoever else kept that window, and the two
    baselines, which are computed again where they kept others."""
    shown = []
    for rule in OWN_RULES:
        kept = [e for r in results if r.name == best for e in r.examples if rule in e.rules]
        for example in kept:
            place = example.video, example.start
            examples = {r.name: e for r in results for e in r.examples if (e.video, e.start) == place}
            again = {"copy_last": copied, "advect": lambda e: advected(e, windows)}
            names = [r.name for r in results if r.name in examples or r.name in again]
            whole = {name: examples[name] if name in examples else again[name](example) for name in names}
            shown.append(Shown(f"{rule} window of {best}", whole))
    return tuple(shown)


def together(shown: Sequence[Shown], more: Sequence[Shown]) -> tuple[Shown, ...]:
    """``shown``, then what of ``more`` is another window; the same window is shown once, with both its rules."""
    rules = {window.place: window.rule for window in more}
    first = tuple(replace(s, rule=f"{s.rule}, and {rules[s.place]}") if s.place in rules else s for s in shown)
    places = {s.place for s in shown}
    return first + tuple(s for s in more if s.place not in places)


def copied(example: Example) -> Example:
    """What copy_last made of the same window."""
    return _bare(example, np.repeat(example.context[-1:], len(example.truth), axis=0), example.mse_copy)


def advected(example: Example, windows: Windows) -> Example:
    """What advect made of the same window, from the teacher's flow of its context."""
    window = windows.of(example.video)
    row = window.start.tolist().index(example.start)
    one = slice(row, row + 1)
    context = Context(**{name: value[one] for name, value in vars(window.context).items()})
    predictor = Advect(Options(), vaes={}, height=windows.height, width=windows.width, context=windows.context)
    with torch.inference_mode():
        frames = predictor.rollout(context, len(example.truth), torch.Generator()).frames
    mse = (frames - window.frames[one]).double().square().mean(dim=(2, 3, 4))[0].numpy()
    return _bare(example, to_uint8(frames[0].numpy()), mse)


def _bare(example: Example, prediction: UInt8[np.ndarray, "y h w 3"], mse: Float[np.ndarray, " y"]) -> Example:
    return Example((), example.video, example.start, example.context, example.truth, prediction, mse, example.mse_copy)


def films(shown: Sequence[Shown], fps: float) -> tuple[Clip, ...]:
    return tuple(_film(s, fps) for s in shown)


def _film(shown: Shown, fps: float) -> Clip:
    first = shown.any
    tiles = tuple(
        Tile(
            name,
            np.concatenate([e.context, e.prediction]),
            f"skill {number(1 - float(e.mse.sum() / e.mse_copy.sum()), 2)}",
        )
        for name, e in shown.examples.items()
    )
    truth = np.concatenate([first.context, first.truth])
    return Clip(f"video_{first.video:05d}", first.start, shown.rule, len(first.context), float(fps), truth, tiles)


def films_note(best: str | None) -> str:
    """By what rules the windows were chosen, for the page."""
    note = (
        "Windows are chosen by rule, the same for every predictor: most motion (copy_last errs most), most collisions "
        "(steps at which something truly collides), median motion (the middle of 15 windows drawn at random), first."
    )
    if best is None:
        return note
    return (
        f"{note} The best and the worst window are those at which {best} gains most and least over copy_last, in mean "
        "squared error; beside it stand the baselines and whoever kept the same window among its own."
    )


def studies(shown: Sequence[Shown], kinds: Mapping[str, Kind]) -> tuple[Study, ...]:
    """Flow, visibility, boxes and collisions of the first windows, where any predictor has such a head."""
    found = (
        _flow(_with(shown, "flow_bwd")),
        _visibility(_with(shown, "visible")),
        _objects(_collisions_first(_with(shown, "boxes", "collision")), kinds),
    )
    return tuple(study for study in found if study.parts)


def _with(shown: Sequence[Shown], *heads: str) -> list[Shown]:
    """The windows, with the predictors that have one of the heads."""
    kept = []
    for window in shown:
        having = {n: e for n, e in window.examples.items() if any(getattr(e, head) is not None for head in heads)}
        if having:
            kept.append(replace(window, examples=having))
    return kept


def _collisions_first(shown: Sequence[Shown]) -> list[Shown]:
    return sorted(shown, key=lambda window: window.rule != "most collisions")


def _steps(example: Example) -> list[int]:
    y = len(example.truth)
    return np.unique(np.linspace(0, y - 1, min(y, STEPS_SHOWN)).round().astype(int)).tolist()


def _pictures(
    shown: Shown, title: str, truth: Mapping[str, Callable[[int], UInt8[np.ndarray, "h w 3"]]],
    said: Callable[[Example, int], UInt8[np.ndarray, "h w 3"]],
) -> PictureTable:  # fmt: skip
    steps = _steps(shown.any)
    rows = [(name, tuple(draw(k) for k in steps)) for name, draw in truth.items()]
    rows += [(name, tuple(said(example, k) for k in steps)) for name, example in shown.examples.items()]
    return PictureTable(title, tuple(f"step {k + 1}" for k in steps), tuple(rows))


def _flow(shown: Sequence[Shown]) -> Study:
    parts = []
    for window in shown[:WINDOWS_STUDIED]:
        true = window.any.true_flow_bwd
        known = [e.flow_bwd for e in window.examples.values()] if true is None else [true]
        longest = max(float(np.linalg.norm(f.astype(np.float32), axis=1).max()) for f in known if f is not None)
        scale = max(LEAST_SCALE_PX, longest)

        def drawn(flow: np.ndarray | None, k: int, scale: float = scale) -> UInt8[np.ndarray, "h w 3"]:
            assert flow is not None
            return flow_picture(flow[k].astype(np.float32), scale)

        truth: dict[str, Callable[[int], np.ndarray]] = {"true frame": window.any.truth.__getitem__}
        if true is not None:
            truth["true flow"] = lambda k, true=true, drawn=drawn: drawn(true, k)
        title = f"{window.title} (full colour {scale:.1f} px)"
        parts.append((_pictures(window, title, truth, lambda e, k, drawn=drawn: drawn(e.flow_bwd, k)), ()))
    note = "Backward flow of the predicted steps: hue is direction, saturation is speed, on one scale per window."
    return Study(
        "Predicted flow", note, tuple(parts), Figure("The colour wheel: right is red, down yellow", flow_legend(72))
    )


def _visibility(shown: Sequence[Shown]) -> Study:
    parts = []
    for window in shown[:WINDOWS_STUDIED]:
        true = window.any.true_visible
        truth: dict[str, Callable[[int], np.ndarray]] = {}
        if true is not None:
            frames = window.any.truth
            truth["truth"] = lambda k, f=frames, v=true: occlusion_overlay(f[k], v[k].astype(np.float32))

        def said(e: Example, k: int) -> UInt8[np.ndarray, "h w 3"]:
            assert e.visible is not None
            return occlusion_overlay(e.prediction[k], e.visible[k].astype(np.float32))

        parts.append((_pictures(window, window.title, truth, said), ()))
    note = (
        "In magenta: pixels of a predicted frame that its predictor says were hidden in the frame before, and that "
        "truly were in the true frame."
    )
    return Study("Predicted occlusion", note, tuple(parts))


def _objects(shown: Sequence[Shown], kinds: Mapping[str, Kind]) -> Study:
    parts = []
    for window in shown[:WINDOWS_STUDIED]:
        one = window.any
        truth = {"truth": lambda k, e=one: boxes_picture(e.truth[k], _true_boxes(e, k))}
        table = _pictures(window, window.title, truth, _boxes)
        parts.append((table, _object_charts(window, kinds)))
    note = (
        f"White: true boxes. Yellow: predicted boxes, thick with a presence of {SURE_BOX:g} or more, which is what "
        f"counts, thin from {UNSURE_BOX:g} on. Below: how well the boxes overlap at each step (0 where an object has "
        "no box that counts), and how likely a collision is said to be, against the steps at which one truly happens."
    )
    return Study("Boxes and collisions", note, tuple(parts))


def _boxes(e: Example, k: int) -> UInt8[np.ndarray, "rows cols 3"]:
    boxes, sure = (None if v is None else v[k] for v in (e.boxes, e.presence))
    return boxes_picture(e.truth[k], _true_boxes(e, k), boxes, sure)


def _true_boxes(e: Example, k: int) -> Float[np.ndarray, "n 4"] | None:
    return None if e.true_boxes is None or e.true_presence is None else e.true_boxes[k][e.true_presence[k] > 0.5]


def _object_charts(window: Shown, kinds: Mapping[str, Kind]) -> tuple[Chart, ...]:
    overlap, collision = [], []
    for name, e in window.examples.items():
        kind = kinds[name]
        iou = _iou(e)
        if any(v is not None for v in iou):
            overlap.append(Curve(name, iou, kind=kind))
        if e.collision is not None:
            collision.append(Curve(name, tuple(float(p) for p in e.collision), kind=kind))
    charts = []
    if overlap:
        charts.append(Chart("Box IoU", "", "higher", tuple(overlap), limits=(0.0, 1.0)))
    if collision:
        true = window.any.true_collision
        events = () if true is None else tuple(int(k) + 1 for k in np.flatnonzero(true > 0.5))
        charts.append(
            Chart("Probability of a collision", "", "neither", tuple(collision), limits=(0.0, 1.0), events=events)
        )
    return tuple(charts)


def _iou(e: Example) -> tuple[float | None, ...]:
    """Mean IoU of the present objects at each step, assigned as for the metric of that name."""
    if e.boxes is None or e.true_boxes is None or e.true_presence is None:
        return ()
    boxes, presence, true_boxes, true_presence = (
        None if v is None else torch.from_numpy(v)[None] for v in (e.boxes, e.presence, e.true_boxes, e.true_presence)
    )
    assert boxes is not None
    assert true_boxes is not None
    assert true_presence is not None
    found = box_statistics(boxes, presence, true_boxes, true_presence)["box_iou"]
    return tuple(float(t / n) if n else None for t, n in zip(found.total[0], found.count[0], strict=True))
