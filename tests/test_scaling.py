"""docs/scaling.md holds what `benchmarks.scaling` prints, and the arithmetic does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.rates import BASE, Rate, from_records, rates_of
from benchmarks.scaling import PRICE, share, tables, timings
from benchmarks.work import NEEDS, amounts_of
from models.predictor import find

COUNTS = (1, 8, 64)


def test_the_page_holds_what_the_script_prints(root: Path) -> None:
    page = (root / "docs/scaling.md").read_text()
    for name, lines in tables(COUNTS, PRICE, {}).items():
        found = re.search(f"<!-- {name}:begin -->\n(.*?)\n<!-- {name}:end -->", page, re.DOTALL)
        assert found is not None, name
        remedy = "run `python -m benchmarks.scaling --markdown docs/scaling.md`, and read the prose again"
        assert found[1] == "\n".join(lines), remedy


def test_every_rate_has_a_source_and_can_be_given(root: Path) -> None:
    a = amounts_of(root)
    assert all(rate.source and rate.value > 0 for rate in rates_of(a, {}).values())
    faster = rates_of(a, {"gpu_over_two_cores": Rate(100, "given", "the command line")})
    slow = rates_of(a, {})
    assert faster["step_seconds.latent_warp"].value == pytest.approx(slow["step_seconds.latent_warp"].value / 2)
    assert faster["decode_seconds"] == BASE["decode_seconds"]
    fixed = rates_of(a, {"step_seconds.latent_warp": Rate(0.1, "given", "the command line")})
    assert fixed["step_seconds.latent_warp"].value == 0.1
    with pytest.raises(SystemExit, match="there is no rate speed; there are: "):
        rates_of(a, {"speed": Rate(1, "given", "the command line")})


def test_more_gpus_never_take_longer_and_flow_divides(root: Path) -> None:
    a = amounts_of(root)
    r = {name: rate.value for name, rate in rates_of(a, {}).items()}
    columns = [timings(a, r, n) for n in COUNTS]
    for name in columns[0]:
        seconds = [column[name].seconds for column in columns]
        assert seconds == sorted(seconds, reverse=True), name
    one, _, many = (column["flow"] for column in columns)
    assert one.parallel / many.parallel == pytest.approx(64)
    assert [share(a, n) for n in COUNTS] == [1, 1, 8]
    assert {column["vae"].busy for column in columns[1:]} == {2}


def test_what_a_clip_holds_is_what_predictors_need() -> None:
    fields = {"flow_bwd": "flow", "boxes": "labels", "presence": "labels", "collision_pairs": "labels"}
    options, kind = find("pixel_warp_lstm")
    assert options is not None
    assert {fields.get(name, name) for name in kind.needs} == set(NEEDS["pixel_warp_lstm"])


def test_records_of_a_workspace_replace_rates(tmp_path: Path, root: Path) -> None:
    runs = tmp_path / ".work/runs"
    runs.mkdir(parents=True)
    facts = '"seconds": 60, "built": 1, "reused": 0, "build_seconds": 60, "device": "cuda:0"'
    (runs / "train@latent_warp.json").write_text(f'{{{facts}, "steps": 200, "train_seconds": 50.0}}')
    (runs / "flow.json").write_text(f'{{{facts}, "pairs_per_second": 75.5}}')
    given = from_records(tmp_path)
    rates = rates_of(amounts_of(root), given)
    assert rates["step_seconds.latent_warp"].value == 0.25
    assert rates["flow_evaluations_per_second"].value == 151
    assert "train@latent_warp on cuda:0" in rates["step_seconds.latent_warp"].source
