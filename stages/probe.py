"""How separate appearance and motion are: what a probe can tell of the one from the other, on held-out videos.

    clevrcast probe [--predictor two_stream]

Probes (`models.leakage`) are fitted on the training split and measured on the test split, per cell of the motion
latents' grid, on all cells in which something moves and as many that stand still. Rows, from what to what:

- the appearance latents of one frame -> the flow (pixels) of the pair that ends in it: a single picture should not say;
- the motion latents of a pair -> the appearance latents of the frame that it ends in: they should not say either, but
  for where an object is;
- for comparison, both frames' appearance latents -> the flow (motion is in there, but no linear map of them), and the
  motion latents -> the flow (all of it should be there).

With ``--predictor`` the same of the latents that its rollout predicts, against the true flow and the true appearance.
Figures are R^2: 1 is everything, 0 nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.catalog import Catalog
from data.clips import ClipSource
from data.errors import ClevrcastError, EmptyError
from data.files import replace_file
from data.resize import resize_field
from data.store import Store
from models.applications import MOVING_PX
from models.autoencoder import Vaes, encode_windows
from models.leakage import Cells, Leakage, neighbourhoods, probe
from models.predictors.two_stream import TwoStream
from pipeline.devices import device
from pipeline.errors import PipelineError
from pipeline.stage import ARTIFACTS
from stages.application import OUT, load_two_stream, positive
from stages.trained import load_vaes

HORIZON = 12
MOST_CELLS = 20000
ROWS = {
    "appearance": ("appearance latents, one frame", "flow"),
    "motion": ("motion latents", "appearance latents"),
    "two frames": ("appearance latents, two frames", "flow"),
    "motion itself": ("motion latents", "flow"),
    "predicted appearance": ("predicted appearance latents", "flow"),
    "predicted motion": ("predicted motion latents", "appearance latents"),
}
"""What is probed: seen, told."""

Grid = Float[Tensor, "t c hf wf"]


@dataclass(frozen=True)
class Row:
    seen: str
    told: str
    leakage: Leakage


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with one message."""
    parser = argparse.ArgumentParser(
        prog="clevrcast probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predictor", help="a trained two_stream of params.yaml, whose predicted latents to probe too")
    parser.add_argument("--videos", type=positive, default=12, help="videos of each split, at most (default 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the resting cells and the networks (default 0)")
    parser.add_argument("--json", type=Path, default=OUT / "probe.json", help=f"figures (default {OUT}/probe.json)")
    arguments = parser.parse_args(argv)
    try:
        rows = compare(arguments)
    except (ClevrcastError, PipelineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    replace_file(arguments.json, (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())
    table = Table(title="R^2 on held-out videos: 0 says nothing, 1 everything")
    for title in ("from", "to"):
        table.add_column(title)
    for title in ("linear", "network"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row.seen, row.told, f"{row.leakage.linear:.3f}", f"{row.leakage.network:.3f}")
    Console().print(table)
    return 0


def compare(arguments: argparse.Namespace) -> list[Row]:
    """All rows of the table.

    Raises:
        EmptyError: nothing moves in the videos of a split.
    """
    predictor = None if arguments.predictor is None else load_two_stream(arguments.predictor)
    vaes = load_vaes(TwoStream)
    generator = torch.Generator().manual_seed(arguments.seed)
    fitted, held_out = (
        collect(windows(split, arguments.videos, vaes, predictor), generator, split) for split in ("train", "test")
    )
    return [Row(*ROWS[name], probe(fitted[name], held_out[name], generator)) for name in fitted]


def windows(
    split: str, most: int, vaes: Vaes, predictor: TwoStream | None
) -> Iterable[tuple[Float[Tensor, "p 2 hf wf"], dict[str, tuple[Grid, Grid]]]]:
    """Of every window: the flow on the grid (pixels), and for each row what is seen and told on the grid, per pair."""
    stores = {"frames": Store(ARTIFACTS / "decode"), "flow_bwd": Store(ARTIFACTS / "flow")}
    h, w = stores["frames"].specs["frames"]["item"][1:3]
    videos = Catalog.load(ARTIFACTS / "acquire").split(split)[:most]
    source = ClipSource(stores, height=h, width=w, videos=videos, cache_bytes=0)
    context = 1 if predictor is None else predictor.context
    on = device()
    for vae in vaes.values():
        vae.to(device=on)  # pyright: ignore[reportCallIssue]  # diffusers hides it
    length = context + HORIZON
    for place in source.windows(length, length):
        clip = source.clip([place], length).to(on)
        frames, flow_bwd = clip.require("frames"), clip.require("flow_bwd")
        appearance = encode_windows(vaes["frame"], frames)[0]
        motion = encode_windows(vaes["flow"], flow_bwd)[0]
        grid = motion.shape[-2:]
        fine, flow = _on_grid(appearance, grid), resize_field(flow_bwd[0], *grid)
        told = slice(context - 1, None)  # pairs that end in frames after the context
        now, before = fine[context:], fine[context - 1 : -1]
        found = {
            "appearance": (now, flow[told]),
            "motion": (motion[told], now),
            "two frames": (torch.cat([before, now], dim=1), flow[told]),
            "motion itself": (motion[told], flow[told]),
        }
        if predictor is not None:
            with torch.inference_mode():
                seen = (appearance[None, :context].unbind(1), motion[None, : context - 1].unbind(1))
                steps = predictor.unroll(*seen, HORIZON)
            found["predicted appearance"] = (_on_grid(torch.cat([s.appearance for s in steps]), grid), flow[told])
            found["predicted motion"] = (torch.cat([s.motion for s in steps]), now)
        yield flow[told].cpu(), {name: (a.cpu(), b.cpu()) for name, (a, b) in found.items()}


def _on_grid(appearance: Float[Tensor, "t z hz wz"], grid: Sequence[int]) -> Grid:
    """The latents of finer cells side by side in the channels of the coarser ones that hold them."""
    return F.pixel_unshuffle(appearance, appearance.shape[-1] // grid[1])


def collect(
    found: Iterable[tuple[Float[Tensor, "p 2 hf wf"], dict[str, tuple[Grid, Grid]]]],
    generator: torch.Generator,
    split: str,
) -> dict[str, Cells]:
    """Cells that move and as many that do not, by row; of more than `MOST_CELLS` some at random."""
    seen: dict[str, list[Tensor]] = {}
    told: dict[str, list[Tensor]] = {}
    for flow, rows in found:
        moving = (flow.norm(dim=1) > MOVING_PX).flatten()
        still = (~moving).nonzero()[:, 0]
        still = still[torch.randperm(len(still), generator=generator)[: int(moving.sum())]]
        chosen = torch.cat([moving.nonzero()[:, 0], still])
        for name, (a, b) in rows.items():
            seen.setdefault(name, []).append(neighbourhoods(a).flatten(0, 2)[chosen])
            told.setdefault(name, []).append(b.permute(0, 2, 3, 1).flatten(0, 2)[chosen])
    total = sum(map(len, next(iter(seen.values()), [])))
    if total == 0:
        raise EmptyError(f"nothing moves in the videos of split {split!r}", remedy="allow more --videos")
    kept = torch.randperm(total, generator=generator)[:MOST_CELLS]
    return {name: Cells(torch.cat(seen[name])[kept], torch.cat(told[name])[kept]) for name in seen}


if __name__ == "__main__":
    raise SystemExit(main())
