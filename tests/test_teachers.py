"""`clevrcast teachers`: the table against truth, and that its figures are ratios of sums over all pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.flow_teachers import TEACHERS
from models.ptlflow_teacher import PYTHON
from stages.teacher_accuracy import accuracy, state_of_pairs
from stages.teachers import main


def test_figures_pool_pairs_and_videos() -> None:
    rng = np.random.default_rng(0)
    states, errors, moving, said, true = [], [], [], [], []
    for video, pairs in ((3, 2), (8, 5)):
        truth = torch.from_numpy(rng.normal(size=(pairs, 2, 6, 7)).astype(np.float32))
        truth[0] *= 0.01  # a pair in which little moves
        flow = truth + torch.from_numpy(rng.normal(size=truth.shape).astype(np.float32))
        seen, true_seen = (torch.from_numpy(rng.random((pairs, 6, 7)).astype(np.float32)) for _ in range(2))
        states.append(state_of_pairs(video, flow, truth, seen, true_seen))
        errors.append((flow - truth).norm(dim=1).flatten())
        moving.append(truth.norm(dim=1).flatten() > 0.5)
        said.append((seen <= 0.5).flatten())
        true.append((true_seen <= 0.5).flatten())
    figures = accuracy(states)
    error, moves, says, is_true = (torch.cat(parts) for parts in (errors, moving, said, true))
    hit, wrong = int((says & is_true).sum()), int((says != is_true).sum())
    f1 = 2 * hit / (2 * hit + wrong)
    assert figures["epe"] == pytest.approx(float(error.mean()), abs=2e-5)
    assert figures["epe_moving"] == pytest.approx(float(error[moves].mean()), abs=2e-5)
    assert figures["epe_background"] == pytest.approx(float(error[~moves].mean()), abs=2e-5)
    assert figures["nonvisible_f1"] == pytest.approx(f1, abs=2e-5)


def test_what_is_undefined_has_no_figure() -> None:
    still, seen = torch.zeros(1, 2, 6, 7), torch.ones(1, 6, 7)
    assert accuracy([state_of_pairs(0, still, still, seen, seen)]) == {"epe": 0, "epe_background": 0, "epe_visible": 0}


def test_the_table_of_a_simulated_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no ../shared/clevrer from here
    monkeypatch.setenv("CLEVRCAST_DEVICE", "cpu")
    monkeypatch.setenv(PYTHON, "/no/such/python")
    sheets, figures = tmp_path / "sheets", tmp_path / "figures.json"
    asked = "dis,raft_large,raft_huge,ptlflow:sea_raft_s,ptlflow:sea_raft_s=things"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    arguments = ["--teachers", asked, "--simulated", "1", "--sizes", "80x120", "--every", "8"]
    assert main([*arguments, "--pictures", str(sheets), "--json", str(figures)]) == 0

    said = json.loads(figures.read_text())
    rows = {(row["teacher"], row["gated"]): row for row in said["rows"]}
    assert list(rows) == [("no motion", False), ("dis", False), ("dis", True), ("truth", False)]
    nothing, dis, gated, truth = (row["figures"] for row in rows.values())
    assert truth["epe"] == 0
    assert truth["nonvisible_f1"] > 0.8
    assert nothing["epe_moving"] > 0.5
    assert nothing["nonvisible_f1"] == 0
    assert dis["epe_moving"] < nothing["epe_moving"]
    assert gated["epe_background"] < dis["epe_background"]
    assert rows["dis", False]["pairs_per_second"] > 0
    assert "OpenCV" in rows["dis", True]["licence"]
    reasons = {a["teacher"]: f"{a['reason']} {a['remedy']}" for a in said["unavailable"]}
    assert list(reasons) == asked.split(",")[1:]
    assert "TORCH_HOME" in reasons["raft_large"]
    assert ", ".join(TEACHERS) in reasons["raft_huge"]
    assert "ptlflow:sea_raft_s=random" in reasons["ptlflow:sea_raft_s"]
    assert PYTHON in reasons["ptlflow:sea_raft_s=things"]
    assert [f.name for f in sheets.iterdir()] == ["dis_80_simulated_00000.png"]

    printed = capsys.readouterr().out
    for text in ("dis, gated", f"{gated['epe_moving']:.3f}", "80x120", "1 simulated"):
        assert text in printed
    assert printed.count("not available:") == 4


def test_the_real_sample(shared: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    folder = ["--videos", str(shared / "clevrer"), "--most", "1", "--simulated", "0"]
    assert main([*folder, "--teachers", "dis", "--sizes", "160x240", "--every", "20", "--json", str(figures)]) == 0
    rows = json.loads(figures.read_text())["rows"]
    assert [row["data"] for row in rows] == ["1 real"] * 4
    nothing, dis, gated, truth = (row["figures"] for row in rows)
    assert dis["epe_moving"] < 0.5 * nothing["epe_moving"]
    assert gated["epe"] < nothing["epe"]
    assert truth["epe"] == 0


def test_nothing_to_measure_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--teachers", "dis", "--simulated", "0"]) == 1
    assert "simulate some" in capsys.readouterr().err
    assert main(["--teachers", "dis", "--simulated", "0", "--videos", "absent"]) == 1
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("argument", [["--sizes", "320"], ["--every", "0"], ["--most", "-1"]])
def test_wrong_arguments_are_refused(argument: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(argument)
    assert f"'{argument[1]}' is not a" in capsys.readouterr().err
