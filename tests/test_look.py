"""`clevrcast inspect STAGE --video ID`: pictures of what a stage made, finished or not, and refusals.

That every stage of a real run can be looked at is tested in `test_pipeline`, which has one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from data.manifest import write_json, write_manifest
from data.overlay import STRUCK, draw_boxes, draw_masks, time_line
from data.store import ArraySpec, ShardPlace, assemble, write_shard
from models.examples import Example
from models.latent_colours import latent_colours
from models.results import _save_example
from models.training_state import TrainingState, save_state
from pipeline import cli
from pipeline.journal import BadItem, Plan, Unit, write_record
from pipeline.shards import kept_state, unfinished
from stages import look
from stages.application import OUT
from stages.train import STATE

T, H, W = 5, 32, 48
SPEC = ArraySpec("frames", (T, H, W, 3), "uint8", ("time", "y", "x", "channel"), 4, "picture")


def film(video: int) -> np.ndarray:
    """Blocks of random colour, so that H.264 keeps them."""
    coarse = np.random.default_rng(video).integers(0, 255, (T, H // 8, W // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def picture(file: Path | str) -> np.ndarray:
    image = cv2.imread(str(file))
    assert image is not None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


@pytest.fixture
def workspace(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: parameters, nothing else."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(root / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stored(workspace: Path) -> Path:
    """decode is finished: videos 0 and 1 are there, 2 is in quarantine."""
    write_shard(workspace / "shard", [SPEC], {i: {"frames": film(i)} for i in (0, 1)}, 4)
    quarantine = [{"id": 2, "reason": "VideoError: half of it is missing", "digest": ""}]
    place = ShardPlace(0, workspace / "shard", (0, 1), "k")
    assemble(Path("artifacts/decode"), [SPEC], [place], 4, manifest={"stage": "decode", "quarantine": quarantine})
    return workspace


@pytest.fixture
def interrupted(workspace: Path) -> Path:
    """decode was killed: the shard of the videos 0-3 is finished, without 2; that of 4-7 is not."""
    units = (Unit((0, 1, 2, 3), ("a",), "videos 0-3", 0), Unit((4, 5, 6, 7), ("b",), "videos 4-7", 1))
    folder = workspace / ".work/decode/fingerprint"
    Plan("decode", "videos", {}, units, time.time()).save(folder)
    place = folder / units[0].key()
    write_shard(place, [SPEC], {i: {"frames": film(i)} for i in (0, 1, 3)}, 4)
    write_record(place, units[0], [BadItem(2, "VideoError: half of it is missing")], 1.0)
    return workspace


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def ask(*arguments: str) -> str:
        assert look.main(arguments) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("what to do: ") == 1
        return said.err

    return ask


@pytest.mark.parametrize("fixture", ["stored", "interrupted"])
def test_a_picture_shows_the_frame_as_stored(
    fixture: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    request.getfixturevalue(fixture)
    assert look.main(["decode", "--video", "1", "--frame", "3"]) == 0
    said = capsys.readouterr().out
    file = Path(said.splitlines()[0])
    assert file == OUT / "inspect-decode-00001.png"
    assert "5 frames of 32x48" in said
    assert ("1 of 2 shards" in said) is (fixture == "interrupted")
    sheet = picture(file)
    scale = 8  # 48 columns are enlarged to 384 at least
    np.testing.assert_array_equal(sheet[22 : 22 + scale * H : scale, 4 : 4 + scale * W : scale], film(1)[3])


def test_a_clip_shows_every_frame(stored: Path) -> None:
    assert look.main(["decode", "--video", "0", "--out", "here.mp4"]) == 0
    with av.open("here.mp4") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 12.5
    assert len(frames) == T
    for frame, truth in zip(frames, film(0), strict=True):
        shown = frame[22 + 32 : 22 + 8 * H : 64, 4 + 32 : 4 + 8 * W : 64].astype(int)
        assert np.abs(shown - truth[4::8, 4::8]).mean() < 8


def test_what_is_not_there_is_refused_with_what_there_is(stored: Path, refused: Callable[..., str]) -> None:
    assert "holds no video 9" in (said := refused("decode", "--video", "9"))
    assert "0-1" in said
    assert "quarantine of decode: VideoError: half of it is missing" in refused("decode", "--video", "2")
    assert "frame 5 was asked for; there are 0 to 4" in refused("decode", "--video", "0", "--frame", "5")
    assert "frame -1 was asked for" in refused("decode", "--video", "0", "--frame=-1")
    assert "a .png file" in refused("decode", "--video", "0", "--frame", "1", "--out", "x.mp4")
    assert "name one with --video" in refused("decode")
    assert "no stage 'decod'" in (said := refused("decod", "--video", "0"))
    assert "encode@flow" in said
    assert "flow has never run here" in refused("flow", "--video", "0")
    assert "train@advect has never run here" in refused("train@advect", "--video", "0")
    assert "there is no artifacts/report/index.html" in refused("report", "--video", "0")


def test_of_an_unfinished_stage_too(interrupted: Path, refused: Callable[..., str]) -> None:
    assert "has not finished the shard of video 5 (videos 4-7)" in (said := refused("decode", "--video", "5"))
    assert "0-1, 3" in said
    assert "quarantine of decode: VideoError: half of it is missing" in refused("decode", "--video", "2")
    assert "does not work on video 8" in refused("decode", "--video", "8")


def test_the_course_of_a_training_finished_or_not(
    workspace: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    curves = {"loss": [3.0, 2.0, 1.0], "flow": [0.3, 0.2, 0.1]}
    unit = Unit((0,), ("a",), "train@advect", steps=10)
    folder = workspace / ".work/train@advect/fingerprint"
    Plan("train@advect", "steps", {}, (unit,), time.time()).save(folder)
    assert "not saved a state yet" in refused("train@advect")
    state = TrainingState(3, 1.0, {}, {}, {}, {}, curves)
    save_state(kept_state(unfinished(folder, unit)) / STATE, state)
    assert look.main(["train@advect", "--out", "curve.png"]) == 0
    assert "3 steps (at step 3 of 10); loss 3.0000 over the first tenth, 1.0000 over" in capsys.readouterr().out
    assert picture("curve.png").shape[0] > 200
    output = Path("artifacts/train/advect")
    write_json(output / "curves.json", curves)
    write_manifest(output, {"stage": "train@advect", "files": {}})
    assert look.main(["train@advect", "--out", "curve.png"]) == 0
    assert "3 steps (finished)" in capsys.readouterr().out
    assert picture("curve.png").shape[0] > 200
    write_json(output / "curves.json", {})
    assert "nothing to learn" in refused("train@advect")


def test_kept_windows_are_shown_or_listed(
    workspace: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    frames, output = film(7), Path("artifacts/evaluate/advect")
    example = Example(
        ("worst", "first"), 7, 16, frames[:2], frames[2:4], frames[3:5], np.array([0.1, 0.01]), np.array([0.2, 0.02])
    )
    _save_example(output / "examples/worst.npz", example)
    write_manifest(output, {"stage": "evaluate@advect", "files": {}})
    assert look.main(["evaluate@advect", "--video", "7", "--frame", "2"]) == 0
    assert "worst and first from frame 16 (skill 0.500)" in capsys.readouterr().out
    assert "video 7 from frame 16 (worst, first)" in refused("evaluate@advect", "--video", "8")
    assert "step 4 was asked for" in refused("evaluate@advect", "--video", "7", "--frame", "4")


def test_the_report_is_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = workspace / "artifacts/report/index.html"
    page.parent.mkdir(parents=True)
    page.touch()
    assert look.main(["report"]) == 0
    assert page.as_uri() in capsys.readouterr().out


def test_the_command_hands_over_where_a_video_is_named(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(cli, "_call", lambda *words: called.append(words) or 0)
    assert cli.main(["inspect", "flow", "--video", "3", "--frame", "-1", "--out", "a b.png"]) == 0
    assert called == [("stages.look", "flow", "--video=3", "--frame=-1", "--out=a b.png")]


def test_latents_have_the_same_colours_every_time() -> None:
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 5, 6, 8, generator=rng) * torch.tensor([0.1, 3.0, 0.5, 1.0, 2.0])[:, None, None]
    colours, explained = latent_colours(latents)
    assert colours.shape == (4, 3, 6, 8)
    assert torch.equal(latent_colours(latents)[0], colours)
    variances = torch.tensor([9, 4, 1]) / (0.01 + 9 + 0.25 + 1 + 4)
    torch.testing.assert_close(explained.float(), variances, atol=0.06, rtol=0)
    # Red is the second channel, the right way round: it varies most.
    assert torch.corrcoef(torch.stack([colours[:, 0].flatten(), latents[:, 1].flatten()]))[0, 1] > 0.9
    assert abs(float(colours.mean()) - 0.5) < 0.02
    flipped, _ = latent_colours(latents.flip(0))
    torch.testing.assert_close(flipped.flip(0), colours, atol=1e-4, rtol=0)


def test_latents_of_few_channels_leave_colours_in_the_middle() -> None:
    colours, explained = latent_colours(torch.linspace(-1, 1, 24).reshape(1, 1, 4, 6))
    assert explained.tolist() == [1, 0, 0]
    assert (colours[:, 1:] == 0.5).all()
    assert colours[0, 0, 0, 0] < colours[0, 0, -1, -1]
    assert (latent_colours(torch.ones(1, 4, 2, 2))[0] == 0.5).all()


def test_boxes_and_masks_are_drawn_where_things_are() -> None:
    image = np.full((64, 96, 3), 90, np.uint8)
    boxes = np.array([[20, 30, 40, 50], [0, 0, 0, 0], [60, 30, 80, 50]], np.float32)
    drawn = draw_boxes(image, boxes, ["0", "1", "2"], [False, False, True])
    assert (drawn[30, 21:39] == drawn[49, 21:39]).all()
    assert (drawn[30, 25] != 90).any()
    assert (drawn[50, 25] == 90).all(), "ends are exclusive"
    assert tuple(drawn[49, 70]) == STRUCK
    assert (drawn[35:45, 25:35] == 90).all()
    assert (image == 90).all()
    instances = np.zeros((64, 96), np.uint8)
    instances[10:60, 10:60] = 2
    masks = draw_masks(image, instances)
    assert (masks[instances == 0] == 90).all()
    assert (masks[12, 12] != 90).any()


def test_a_time_line_marks_collisions() -> None:
    plain, marked = (time_line(200, 3, 10, marks, "3 of 9") for marks in ((), (9,)))
    assert plain.shape == (36, 200, 3)
    assert (marked[4, 190:193] == STRUCK).all(axis=-1).any()
    assert not (plain[4, 190:193] == STRUCK).all(axis=-1).any()
