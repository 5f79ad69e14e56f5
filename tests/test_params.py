"""params.yaml: everything wrong is refused with the key, the value and a remedy."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from models.training import TrainingOptions
from pipeline import profiles
from pipeline.errors import ParamsError
from pipeline.params import check_options, load_params, parse_params, read_yaml, reference


@pytest.fixture
def raw(root: Path) -> dict[str, Any]:
    return read_yaml(root / "params.yaml")


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    out = copy.deepcopy(raw)
    node = out
    *parents, last = path.split(".")
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return out


def test_the_committed_file_is_valid(root: Path) -> None:
    params = load_params(root / "params.yaml")
    assert params.decode.steps == len(range(0, params.decode.frames, params.decode.stride))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("decode.stride", "2", r"decode\.stride = '2'"),
        ("decode.stride", 0, r"decode\.stride = 0"),
        ("decode.stride", True, r"decode\.stride = True"),
        ("decode.resolution", [130, 192], r"decode\.resolution \[130, 192\].*multiples of 8.*\[128, 192\]"),
        ("flow.itterations", 3, r"flow\.itterations is not a known key; did you mean 'iterations'"),
        ("flow.gate.treshold", 3, r"flow\.gate\.treshold is not a known key; did you mean 'threshold'"),
        ("flow.compiled", True, r"flow\.compiled is for raft_small.*flow\.teacher is dis"),
        ("flow.teacher", "raft", r"flow\.teacher = 'raft'.*raft_small"),
        ("occlusion.absolute", ..., r"occlusion\.absolute is missing"),
        ("occlusion", ..., r"occlusion is missing"),
        ("acquire.size", 3, r"acquire\.size: the name 'size' is refused"),
        ("predictors.latent_warp.options.nfiles", 3, r"nfiles' is refused"),
        ("predictors.copy_last", ..., r"predictors\.copy_last is missing"),
        ("evaluate.horizon", 100, r"4 \+ evaluate\.horizon 100 = 104 frames.*64"),
        ("evaluate.split", "train", r"evaluate\.split is train: models would be scored on what they were trained on"),
        ("evaluate.split", "validation", r"evaluate\.split is validation.*\['test', 'train'\]"),
        ("acquire.source", "local", r"acquire\.root is empty"),
        ("acquire.videos", "official", r"acquire\.videos is official"),
        ("predictors.latent_warp.frozen", ["trunk"], r"frozen is \['trunk'\] and pretrained is absent"),
        ("predictors.latent_warp.horizon", 61, r"predictors\.latent_warp\.horizon 61 is more than the 64"),
    ],
)
def test_what_is_wrong_is_named(raw: dict[str, Any], path: str, value: Any, said: str) -> None:
    with pytest.raises(ParamsError) as caught:
        parse_params(changed(raw, path, value))
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)
    assert "what to do:" in str(caught.value)


def test_resolutions_must_agree_for_the_scene_teacher(raw: dict[str, Any]) -> None:
    raw = changed(changed(raw, "flow.teacher", "scene"), "label.resolution", [160, 240])
    with pytest.raises(ParamsError, match=r"\[160, 240\].*\[320, 480\]"):
        parse_params(raw)


def test_raft_needs_128_pixels(raw: dict[str, Any]) -> None:
    raw = changed(changed(raw, "flow.teacher", "raft_small"), "flow.resolution", [120, 480])
    with pytest.raises(ParamsError, match=r"\[120, 480\] has a side below 128"):
        parse_params(raw)


def test_all_errors_are_listed_at_once(raw: dict[str, Any]) -> None:
    wrong = changed(changed(raw, "decode.stride", -1), "shards.videos", "many")
    with pytest.raises(ParamsError) as caught:
        parse_params(wrong)
    assert "decode.stride" in str(caught.value)
    assert "shards.videos" in str(caught.value)


def test_options_of_modules_are_checked_alike() -> None:
    with pytest.raises(ParamsError, match=r"predictors\.x\.training\.stepz.*did you mean 'steps'"):
        check_options(TrainingOptions, {"stepz": 3}, "predictors.x.training")


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("acquire:\n  videos: {train: 0-3\n")
    with pytest.raises(ParamsError, match="line 3"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", sorted(file.stem for file in (Path(__file__).parents[1] / "profiles").glob("*.yaml")))
def test_profiles_give_valid_parameters_and_keep_comments(root: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(root / "profiles", tmp_path / "profiles")
    shutil.copy(root / "params.yaml", tmp_path)
    changes = profiles.apply(tmp_path, name)
    assert changes
    load_params(tmp_path / "params.yaml")
    assert (tmp_path / "params.yaml").read_text().startswith((root / "params.yaml").read_text().splitlines()[0])
    assert profiles.apply(tmp_path, name) == []


def test_a_profile_that_breaks_the_parameters_changes_nothing(root: Path, tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/bad.yaml").write_text("decode:\n  stride: 0\n")
    shutil.copy(root / "params.yaml", tmp_path)
    before = (tmp_path / "params.yaml").read_text()
    with pytest.raises(ParamsError, match=r"decode\.stride = 0"):
        profiles.apply(tmp_path, "bad")
    assert (tmp_path / "params.yaml").read_text() == before


def test_null_removes_a_key() -> None:
    target = {"a": {"b": 1, "c": 2}}
    changes: list[str] = []
    profiles.merge(target, {"a": {"b": None, "d": 3}}, changes)
    assert target == {"a": {"c": 2, "d": 3}}
    assert changes == ["a.b: removed", "a.d: (absent) -> 3"]


def test_every_parameter_is_explained() -> None:
    rows = reference()
    assert {"acquire.videos", "flow.gate.radius", "predictors.NAME.model", "vae.NAME.batch"} <= {row[0] for row in rows}
    assert [row[0] for row in rows if not row[3]] == []


def test_dvc_tracks_only_parameters_that_the_file_holds(root: Path, raw: dict[str, Any]) -> None:
    """DVC stops at a tracked key that params.yaml leaves to its default."""
    stages = read_yaml(root / "dvc.yaml")["stages"]
    for name, body in stages.items():
        keys = list(raw[body["foreach"][2:-1]]) if "foreach" in body else [""]
        for path in (p.replace("${key}", key) for p in body.get("do", body).get("params", []) for key in keys):
            node: Any = raw
            for part in path.split("."):
                assert part in node, f"{name} tracks {path}, which params.yaml does not hold"
                node = node[part]
