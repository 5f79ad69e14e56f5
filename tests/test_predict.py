"""`clevrcast predict`: the evaluation's rollout on videos of the data set, and one clear answer to any other file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from data.catalog import Catalog, Video
from data.clips import ClipSource, Context
from data.errors import SourceError, VideoError, WeightsError
from data.files import file_digest
from data.footage import find_videos
from data.framing import frame
from data.picture import encode_video
from data.store import Store
from models.autoencoder import Vaes
from models.checkpoint import save_checkpoint
from pipeline.params import load_params
from pipeline.stage import ARTIFACTS, Job
from stages import decode, flow, occlusion, predict
from stages.forecast import Forecaster, start_at
from stages.predict import choose, load, main
from tests.test_predictors import CONTEXT, HEIGHT, SMALL, WIDTH, made, shaken, vaes

__all__ = ["vaes"]  # a fixture of the contract's tests

H, W, T = 64, 96, 60
Write = Callable[..., Path]
Say = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def workspace(root: Path, tmp_path_factory: pytest.TempPathFactory, vaes: Vaes) -> Path:
    """A finished workspace, as far as predicting needs it: parameters, autoencoders, two learned models, baselines."""
    folder = tmp_path_factory.mktemp("workspace")
    params = YAML().load(root / "params.yaml")
    params["decode"]["resolution"] = [HEIGHT, WIDTH]
    params["evaluate"]["protocol"] = "test"
    params["flow"]["resolution"] = [160, 240]
    params["flow"]["gate"]["radius"] = 8
    YAML().dump(params, folder / "params.yaml")
    for key, vae in vaes.items():
        vae.save_pretrained(str(folder / "artifacts/vae" / key))
    for name in ("copy_last", "advect", "latent_warp", "pixel_warp_lstm"):
        options = {**SMALL.get(name, {}), **({"boxes": 0.1} if name == "pixel_warp_lstm" else {})}
        model = shaken(made(name, vaes, **options))
        save_checkpoint(folder / "artifacts/train" / name, model, name=name, options=options, steps=1, vaes=vaes)
    return folder


@pytest.fixture
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("CLEVRCAST_DEVICE", "cpu")
    return workspace


@pytest.fixture(scope="module")
def forecaster(workspace: Path) -> Iterator[Forecaster]:
    """One for many tests: loading and starting its reader take longer than predicting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        patch.setenv("CLEVRCAST_DEVICE", "cpu")
        made = load("latent_warp")
    yield made
    made.close()


@pytest.fixture
def say(
    inside: Path, forecaster: Forecaster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Say:
    """Runs the command with the loaded predictor: its exit code, and all that it printed."""
    monkeypatch.setattr(predict, "load", lambda _: forecaster)

    def run(*arguments: object) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def squares(t: int, h: int = H, w: int = W) -> np.ndarray:
    """A bright square that moves by 1/48 of the width a frame, over a slope."""
    film = np.empty((t, h, w, 3), np.uint8)
    film[:] = np.linspace(40, 90, w, dtype=np.uint8)[:, None]
    for k in range(t):
        x = (k * w // 48) % w
        film[k, h // 3 : 2 * h // 3, x : x + w // 6] = (200, 180, 40)
    return film


def write(
    path: Path, film: np.ndarray, rate: Fraction | int = 25, *, codec: str = "libx264", pixels: str = "yuv420p",
    turn: int = 0, ticks: list[int] | None = None,
) -> Path:  # fmt: skip
    """A video; ``ticks`` are times in milliseconds, ``turn`` a note to turn it when it is shown."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = film.shape[1], film.shape[2], pixels
        if turn:
            stream.set_display_rotation(turn)
        for k, image in enumerate(film):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if ticks is not None:
                picture.pts, picture.time_base = ticks[k], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def written(folder: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    assert (folder / "strip.png").read_bytes().startswith(b"\x89PNG")
    with av.open(str(folder / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
    return json.loads((folder / "prediction.json").read_text(), parse_constant=refuse)


# The same as the evaluation


@pytest.mark.real
def test_on_a_video_of_the_data_set_it_is_the_evaluations_rollout(
    shared: Path, root: Path, workspace: Path, forecaster: Forecaster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next((shared / "clevrer/videos").rglob("video_00011.mp4"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLEVRCAST_WORKERS", "1")
    (ARTIFACTS / "acquire").mkdir(parents=True)
    shutil.copy(path, ARTIFACTS / "acquire/video.mp4")
    Catalog(ARTIFACTS / "acquire", (Video(11, "test", "video.mp4", file_digest(path), None, None),), ()).save()
    params = load_params(workspace / "params.yaml")
    for stage in (decode, flow, occlusion):
        stage.run(Job(stage.__name__.rpartition(".")[2], "", params, root, ("cpu",)))
    stores = {"frames": "decode", "flow_bwd": "flow", "visible": "occlusion"}
    source = ClipSource(
        {field: Store(ARTIFACTS / stage) for field, stage in stores.items()}, height=HEIGHT, width=WIDTH, videos=[11]
    )
    for first in (16, 48):  # the last window needs all of the video
        clip = source.clip([(11, first)], CONTEXT + 12)
        observed, flows, visible = (clip.require(name) for name in stores)
        context = Context(observed[:, :CONTEXT], flows[:, : CONTEXT - 1], visible[:, : CONTEXT - 1])
        with torch.inference_mode():
            expected = forecaster.predictor.rollout(context, 12, torch.Generator()).frames[0]
        found = forecaster.predict(path, start=2 * first)
        assert torch.equal(found.observed, context.frames[0])
        assert torch.equal(found.flow_bwd, context.flow_bwd[0])
        assert found.flow_bwd.abs().max() > 0.3
        assert torch.equal(found.truth, observed[0, CONTEXT:])
        torch.testing.assert_close(found.frames, expected, atol=1e-5, rtol=0)
    assert found.errors["copy_last"] == pytest.approx(
        [float((found.observed[-1] - frame).square().mean()) for frame in found.truth]
    )


# Any video


def test_a_phones_video_is_turned_upright_cut_and_taken_at_the_models_rate(say: Say, tmp_path: Path) -> None:
    upright = np.zeros((100, 480, 270, 3), np.uint8)
    upright[:, 150:330] = squares(100, 180, 270)
    lying = np.ascontiguousarray(np.rot90(upright, 1, axes=(1, 2)))
    path = write(tmp_path / "auf dem Markt, größer.mp4", lying, Fraction(30000, 1001), turn=-90)
    code, said = say(path, "--start", "1s", "--out", tmp_path / "out")
    assert code == 0, said
    assert "480x270, turned by 90 degrees at 29.97 frames/s" in said
    assert "cut to the middle 270x180 (62 % of the picture is not seen), resized to 48x32" in said
    found = written(tmp_path / "out")
    assert found["video"]["path"] == str(path)
    assert (found["video"]["width"], found["video"]["height"], found["video"]["rotation"]) == (270, 480, 90)
    assert found["video"]["frames_per_second"] == pytest.approx(29.97, abs=0.001)
    assert found["taken"]["observed_seconds"] == pytest.approx([1, 1.08, 1.16, 1.24], abs=0.5 / 29.97)
    assert len(found["steps"]) == 12
    assert all(step["psnr"]["predicted"] > 10 for step in found["steps"])


def test_what_is_seen_is_what_was_shown(forecaster: Forecaster, tmp_path: Path) -> None:
    """Turned the right way round: top left stays top left."""
    film = np.zeros((30, 64, 96, 3), np.uint8)
    film[:, :32, :48], film[:, 32:, 48:] = (250, 0, 0), (0, 0, 250)
    for turn, quarters in ((0, 0), (-90, 1), (180, 2), (90, 3)):
        stored = np.ascontiguousarray(np.rot90(film, quarters, axes=(1, 2)))
        seen = forecaster.predict(write(tmp_path / f"{turn}.mp4", stored, turn=turn), horizon=1).observed[0]
        assert seen[:, 6, 8].tolist() == pytest.approx([0.98, 0, 0], abs=0.08)
        assert seen[:, 26, 40].tolist() == pytest.approx([0, 0, 0.98], abs=0.08)


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "size"),
    [
        ("a.webm", "libvpx", "yuv420p", (62, 98)),
        ("b.avi", "mpeg4", "yuv420p", (48, 128)),
        ("c.gif", "gif", "rgb8", (65, 97)),
        ("d.mov", "libx264", "yuv444p", (33, 51)),
    ],
)
def test_containers_and_odd_sizes(
    forecaster: Forecaster, tmp_path: Path, name: str, codec: str, pixels: str, size: tuple[int, int]
) -> None:
    path = write(tmp_path / name, squares(40, *size), 25, codec=codec, pixels=pixels)
    for fit in ("crop", "stretch", "pad"):
        made = forecaster.predict(path, fit=fit, horizon=3)
        assert made.film.about.frames == 40
        assert len(made.truth) == 3
        assert made.film.framing.cut == pytest.approx(0, abs=0.45 if fit == "crop" else 1e-9)


def test_of_stuttering_times_the_nearest_is_taken(forecaster: Forecaster, tmp_path: Path) -> None:
    kept = [k for k in range(T) if k % 7 not in (2, 3)]
    path = write(tmp_path / "v.mkv", squares(T)[kept], ticks=[40 * k for k in kept])
    made = forecaster.predict(path, horizon=20)
    for step in range(CONTEXT + 20):
        nearest = min(kept, key=lambda k: abs(k - 2 * step))
        assert abs(made.film.times[step] * 25 - 2 * step) == pytest.approx(abs(nearest - 2 * step), abs=0.05)


def test_a_late_start_is_found_by_seeking(forecaster: Forecaster, tmp_path: Path) -> None:
    film = squares(25 * 24)
    path = write(tmp_path / "long.mp4", film)
    late, early = forecaster.predict(path, start="22.08s"), forecaster.predict(path, start=22.08 - 0.04 * 480)
    assert late.film.times[0] == pytest.approx(22.08)
    assert (late.observed - early.observed).abs().mean() < 0.01  # the same part of the square's way
    assert not late.film.damage


def test_a_folder_of_frames_is_a_video(say: Say, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for k, image in enumerate(squares(20)):
        cv2.imwrite(str(tmp_path / f"frames/{k + 1}.png"), image[..., ::-1])
    assert [p.name for p in find_videos(tmp_path / "frames").videos[0].pictures][:10] == [
        f"{k}.png" for k in range(1, 11)
    ]
    code, said = say(tmp_path / "frames", "--out", tmp_path / "out")
    assert code == 0, said
    assert written(tmp_path / "out")["taken"]["observed_seconds"] == pytest.approx([0, 0.08, 0.16, 0.24])
    code, said = say(tmp_path / "frames", "--fps", 50, "--horizon", 1, "--out", tmp_path / "fast")
    assert code == 0, said
    assert written(tmp_path / "fast")["video"]["duration_seconds"] == pytest.approx(0.4)


def test_a_folder_of_videos_one_of_them_bad(say: Say, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    write(folder / "one.mp4", squares(40))
    write(folder / "two.mov", squares(40))
    (folder / "bad.mp4").write_bytes(b"no video at all" * 99)
    (folder / "notes.txt").write_text("x")
    code, said = say(folder, "--start", 0, "--start", "0.4s", "--horizon", 2, "--out", tmp_path / "out")
    assert code == 1
    assert "passed over, no video: notes.txt" in said
    assert "2 of 6 forecasts could not be made" in said
    for place in ("one/from-0", "one/from-0.4s", "two/from-0", "two/from-0.4s"):
        assert len(written(tmp_path / "out" / place)["steps"]) == 2


def test_a_video_that_ends_early_is_compared_as_far_as_it_goes(say: Say, tmp_path: Path) -> None:
    code, said = say(write(tmp_path / "v.mp4", squares(14)), "--out", tmp_path / "out")
    assert code == 0, said
    assert "the background is the median of 7 frames only" in said
    steps = written(tmp_path / "out")["steps"]
    assert [step["truth_seconds"] is None for step in steps] == [False] * 3 + [True] * 9
    assert steps[-1]["skill"] == {"predicted": None, "advect": None}


def test_the_same_seed_gives_the_same_bytes(say: Say, tmp_path: Path) -> None:
    path = write(tmp_path / "v.mp4", squares(40))
    for place in ("a", "b"):
        assert say(path, "--horizon", 2, "--out", tmp_path / place)[0] == 0
    for name in ("clip.mp4", "strip.png", "prediction.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_stream_that_breaks_is_used_up_to_there(say: Say, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (T, H, W, 3), dtype=np.uint8)
    whole = encode_video(noise, 25)
    path = tmp_path / "broken.mp4"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    code, said = say(path, "--out", tmp_path / "out")
    assert code == 0, said
    assert f"it promises {T} frames and holds " in said
    assert any("promises" in line for line in written(tmp_path / "out")["video"]["damage"])
    code, said = say(path, "--start", T - 6)
    assert code == 1
    assert f"from 2.16 s on there are 0 of the {CONTEXT} frames" in said
    hole = bytearray(whole)
    hole[len(whole) // 2 : len(whole) // 2 + 2000] = bytes(2000)
    path.write_bytes(bytes(hole))
    code, said = say(path, "--horizon", 40, "--out", tmp_path / "out")
    assert code == 0, said
    assert "damaged" in said or "breaks" in said
    steps = written(tmp_path / "out")["steps"]
    assert steps[0]["truth_seconds"] is not None
    assert steps[25]["truth_seconds"] is None


# Errors


def test_what_cannot_be_predicted_is_said_in_one_message(say: Say, tmp_path: Path) -> None:
    still = np.ascontiguousarray(squares(1)[0])
    with av.open(str(tmp_path / "sound.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))  # type: ignore[union-attr]
        container.mux(stream.encode(None))  # type: ignore[union-attr]
    for name in ("still.png", "still.jpg"):
        cv2.imwrite(str(tmp_path / name), still)
    (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    (tmp_path / "none").mkdir()
    (tmp_path / "none/readme.md").touch()
    write(tmp_path / "three.mp4", squares(3))
    write(tmp_path / "short.mp4", squares(30))
    cases: dict[tuple[object, ...], str] = {
        ("three.mp4",): f"it has 3 frames and ends at 0.12 s; latent_warp needs {CONTEXT} frames",
        ("short.mp4", "--start", "1s"): f"from 1.00 s on there are 3 of the {CONTEXT} frames that latent_warp needs",
        ("short.mp4", "--horizon", 10**6): "a horizon of 1000000 steps needs about",
        ("short.mp4", "--out", tmp_path / "three.mp4"): "three.mp4 cannot be written (File exists)",
        ("still.png",): "it is a still picture\n  what to do: set it in motion with `clevrcast animate",
        ("still.jpg",): "it is a still picture",
        ("garbage.mp4",): "FFmpeg cannot read it as a video",
        ("list.mp4",): "list.mp4: ",
        ("empty.mp4",): "the file is empty (0 bytes)",
        ("sound.m4a",): "there is sound only",
        ("missing.mp4",): "there is no such file or folder",
        ("none",): "none of the 1 entries of this folder is a video",
    }
    for (name, *more), expected in cases.items():
        code, said = say(tmp_path / str(name), *more)
        assert code == 1, said
        assert expected in said
        assert said.count("what to do:") == 1, said
        assert "Traceback" not in said
    assert not list(Path("artifacts/apply").glob("*garbage*")), "no folder for what was not predicted"


def test_a_decoder_that_hangs_is_killed(
    forecaster: Forecaster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "v.mp4", squares(30))
    monkeypatch.setattr(forecaster.reader.worker, "timeout", 0.0)
    with pytest.raises(VideoError, match="no answer within 0 s, the decoder was killed"):
        forecaster.predict(path)
    monkeypatch.undo()
    assert len(forecaster.predict(path, horizon=1).frames) == 1


def test_one_video_is_asked_for(forecaster: Forecaster, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match="holds 2 videos"):
        forecaster.predict(tmp_path)


@pytest.mark.parametrize("given", ["-1", "x", "nan", "infs", "-2s", "1m"])
def test_no_start(given: str) -> None:
    with pytest.raises(ValueError):
        start_at(given)


# Which predictor


def test_the_best_of_the_report_is_chosen_else_the_default_else_the_only_one(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose() == ("latent_warp", "the default where there is no artifacts/report/metrics.json")
    report = {"advect": 0.9, "pixel_warp_lstm": 0.5, "latent_warp": 0.4, "two_stream": 0.7, "vae_ceiling": 0.99}
    monkeypatch.setattr(predict, "_skills", lambda: report)
    assert choose() == ("pixel_warp_lstm", "the best of 2 in artifacts/report/metrics.json (skill 0.500)")


def test_nothing_is_trained(inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="no predictor 'two_stream' is trained here; there are advect, copy_last"):
        load("two_stream")
    shutil.copy("params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="make demo"):
        load()


def test_boxes_and_collisions_of_a_predictor_that_has_them(inside: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "v.mp4", squares(40, 64, 128))
    forecaster = load("pixel_warp_lstm")
    try:
        made = forecaster.predict(str(path), horizon=2)
    finally:
        forecaster.close()
    made.save(tmp_path / "out")
    step = written(tmp_path / "out")["steps"][1]
    assert 0 <= step["collision"] <= 1
    assert made.boxes is not None
    assert len(step["boxes"]) == made.boxes.shape[1]
    for box in step["boxes"]:
        assert 0 <= box["presence"] <= 1
        scale = 64 / HEIGHT  # the middle 96 of 128 columns are seen
        x0, y0, x1, y1 = box["model"]
        expected = np.clip([x0 * scale + 16, y0 * scale, x1 * scale + 16, y1 * scale], 0, [128, 64, 128, 64])
        assert box["video"] == pytest.approx(expected.tolist(), abs=1e-4)


# Geometry

sides = st.integers(1, 4000)


@given(sides, sides, st.sampled_from(["crop", "stretch", "pad"]), st.sampled_from([0, 90, 180, 270]))
def test_a_framing_keeps_the_shape_and_stays_in_the_picture(width: int, height: int, fit: Any, turn: int) -> None:
    framing = frame(width, height, Fraction(3, 2), fit=fit, turn=turn)
    assert (framing.width, framing.height) == ((height, width) if turn % 180 else (width, height))
    x, y, w, h = framing.crop
    assert 0 <= x <= x + w <= framing.width
    assert 0 <= y <= y + h <= framing.height
    assert framing.cut == 0 or fit == "crop"
    if fit != "stretch":  # up to half a pixel of rounding
        assert abs(framing.canvas[0] - 1.5 * framing.canvas[1]) <= 1.5
    whole = framing.to_source((0.0, 0.0, 48.0, 32.0), 32, 48)
    assert whole == pytest.approx((x, y, x + w, y + h))


def test_pixels_that_are_not_square_count_by_their_width() -> None:
    assert frame(720, 576, Fraction(3, 2), pixel=Fraction(16, 11)).crop == (63, 0, 594, 576)
    assert frame(720, 576, Fraction(3, 2), pixel=Fraction(16, 11), fit="pad").canvas == (720, 698)
