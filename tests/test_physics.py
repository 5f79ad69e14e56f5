"""Simulated scenes: repeatable, physical, in CLEVRER's schema, and statistically beside released annotations."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.clevrer import FRAMES, Annotation, read_annotation, write_annotation
from data.physics import HALF_HEIGHT, SECONDS, inside_view, simulate

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "clevrer"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scenes() -> list[Annotation]:
    return [simulate(np.random.default_rng(seed), seed) for seed in range(20)]


def digest(annotation: Annotation, folder: Path) -> str:
    path = folder / "annotation.json"
    write_annotation(annotation, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def speeds(annotation: Annotation) -> np.ndarray:
    return np.linalg.norm(annotation.velocity, axis=-1)


def summary(annotations: list[Annotation]) -> dict[str, float]:
    """One number per row of the table in `data.physics`."""
    moving = np.concatenate([speeds(a)[a.inside_camera_view] for a in annotations])
    slowing: dict[str, list[float]] = {"sphere": [], "cylinder": [], "cube": []}
    for a in annotations:
        v = speeds(a)
        for k, p in enumerate(a.properties):
            free = np.ones(a.frames - 1, dtype=bool)
            for c in a.collisions:
                if p.object_id in c.object_ids:
                    free[max(0, c.frame - 2) : c.frame + 12] = False
            free &= v[:-1, k] > 0.8
            slowing[p.shape] += (1 - v[1:, k][free] / v[:-1, k][free]).tolist()
    enters = np.concatenate([speeds(a)[0] > 0.1 for a in annotations])
    return {
        "objects": float(np.mean([len(a.properties) for a in annotations])),
        "entering": float(enters.sum() / len(annotations)),
        "collisions": float(np.mean([len(a.collisions) for a in annotations])),
        "collision frames": float(np.mean([len({c.frame for c in a.collisions}) / a.frames for a in annotations])),
        "start speed": float(np.concatenate([speeds(a)[0] for a in annotations])[enters].mean()),
        "median speed": float(np.median(moving[moving > 0.05])),
        "in view": float(np.mean([a.inside_camera_view.mean() for a in annotations])),
        **{f"{shape} slows": float(np.mean(values)) for shape, values in slowing.items()},
    }


#: `summary` of eight released annotations, and how far simulated ones may be from it.
RELEASED = {
    "objects": (5.0, 0.5),
    "entering": (2.6, 0.5),
    "collisions": (2.5, 0.8),
    "collision frames": (0.0195, 0.007),
    "start speed": (2.84, 0.1),
    "median speed": (1.11, 0.25),
    "in view": (0.895, 0.06),
    "sphere slows": (0.0033, 0.0015),
    "cylinder slows": (0.0090, 0.0025),
    "cube slows": (0.0082, 0.0025),
}


def test_statistics_are_those_of_released_annotations(scenes: list[Annotation]) -> None:
    ours = summary(scenes)
    print(
        "\n" + "\n".join(f"{name:18s} released {RELEASED[name][0]:8.4f}  simulated {ours[name]:8.4f}" for name in ours)
    )
    for name, (value, tolerance) in RELEASED.items():
        assert ours[name] == pytest.approx(value, abs=tolerance), name


@pytest.mark.real
def test_the_released_statistics_are_what_the_sample_says() -> None:
    if not SAMPLE.is_dir():
        pytest.skip(f"the real CLEVRER sample is not at {SAMPLE}")
    released = [read_annotation(p) for p in sorted(SAMPLE.rglob("annotation_*.json"))]
    measured = summary(released)
    for name, (value, _) in RELEASED.items():
        assert measured[name] == pytest.approx(value, rel=0.03), name
    agree = np.mean([(inside_view(a) == a.inside_camera_view).mean() for a in released])
    assert agree > 0.99


def test_equal_seeds_give_equal_bytes_here_and_in_a_fresh_process(tmp_path: Path) -> None:
    here = digest(simulate(np.random.default_rng(5), 5), tmp_path)
    assert here == digest(simulate(np.random.default_rng(5), 5), tmp_path)
    assert here != digest(simulate(np.random.default_rng(6), 5), tmp_path)
    program = (
        "import numpy as np, pathlib, sys\n"
        "from data.clevrer import write_annotation\n"
        "from data.physics import simulate\n"
        "write_annotation(simulate(np.random.default_rng(5), 5), pathlib.Path(sys.argv[1]))\n"
    )
    path = tmp_path / "fresh.json"
    subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=True, capture_output=True)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == here


def test_annotations_survive_their_own_file(scenes: list[Annotation], tmp_path: Path) -> None:
    for a in scenes[:4]:
        write_annotation(a, tmp_path / "a.json")
        again = read_annotation(tmp_path / "a.json")
        assert again.properties == a.properties
        assert again.collisions == a.collisions
        for name in ("location", "orientation", "velocity", "angular_velocity", "inside_camera_view"):
            np.testing.assert_array_equal(getattr(again, name), getattr(a, name))


def test_objects_are_few_and_different(scenes: list[Annotation]) -> None:
    for a in scenes:
        assert a.frames == FRAMES
        assert 3 <= len(a.properties) <= 6
        assert len({(p.shape, p.color, p.material) for p in a.properties}) == len(a.properties)
        assert (speeds(a)[0] > 0).any()
        assert (speeds(a)[0] == 0).any()
    assert {p.shape for a in scenes for p in a.properties} == {"sphere", "cylinder", "cube"}


def test_moving_objects_start_out_of_view_and_resting_ones_in_view(scenes: list[Annotation]) -> None:
    for a in scenes:
        still = speeds(a)[0] == 0
        assert a.inside_camera_view[0][still].all()
        assert a.inside_camera_view[:, ~still].any()


def test_bodies_stay_on_the_ground_and_out_of_each_other(scenes: list[Annotation]) -> None:
    for a in scenes:
        assert np.abs(a.location[..., 2] - HALF_HEIGHT).max() < 0.06
        gaps = np.linalg.norm(a.location[:, :, None, :2] - a.location[:, None, :, :2], axis=-1)
        assert gaps[:, ~np.eye(len(a.properties), dtype=bool)].min() > 0.35


def test_locations_follow_velocities(scenes: list[Annotation]) -> None:
    for a in scenes:
        step, expected = np.diff(a.location, axis=0), SECONDS * (a.velocity[1:] + a.velocity[:-1]) / 2
        assert np.median(np.abs(step - expected)) < 2e-4
        hit = {c.frame for c in a.collisions}
        free = [t for t in range(a.frames - 1) if not hit & {t - 1, t, t + 1, t + 2}]
        assert np.quantile(np.abs(step - expected)[free], 0.99) < 0.01


def test_collisions_are_contacts_that_change_velocities(scenes: list[Annotation]) -> None:
    for a in scenes:
        for c in a.collisions:
            i, j = c.object_ids
            assert np.linalg.norm(a.location[c.frame, i, :2] - a.location[c.frame, j, :2]) < 0.6
            middle = (a.location[c.frame, i] + a.location[c.frame, j]) / 2
            assert np.linalg.norm(middle[:2] - np.array(c.location)[:2]) < 0.3
            assert a.inside_camera_view[c.frame, [i, j]].all()
    changes = [
        np.linalg.norm(a.velocity[min(c.frame + 1, FRAMES - 1), i] - a.velocity[max(c.frame - 2, 0), i])
        for a in scenes for c in a.collisions for i in c.object_ids
    ]  # fmt: skip
    assert np.median(changes) > 0.2


def test_cylinders_stand_upright_in_clevrers_convention(scenes: list[Annotation]) -> None:
    tilts = [
        a.orientation[:, k, :2] - [np.pi / 2, 0]
        for a in scenes for k, p in enumerate(a.properties) if p.shape == "cylinder"
    ]  # fmt: skip
    assert np.median(np.abs(np.concatenate(tilts))) < 0.01


def test_bounds_on_collisions_are_kept_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a = simulate(np.random.default_rng(1), collisions=(3, 3), frames=100)
    assert len(a.collisions) == 3
    assert a.frames == 100
    monkeypatch.setattr("data.physics._ATTEMPTS", 20)
    with pytest.raises(RuntimeError, match="50 to 60"):
        simulate(np.random.default_rng(1), collisions=(50, 60), frames=2)
