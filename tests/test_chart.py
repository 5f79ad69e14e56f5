"""Charts: marks where the numbers are, gaps, floors and ceilings, and the same bytes every time."""

from __future__ import annotations

import re

import pytest

from data.chart import HEIGHT, LEFT, TOP, Chart, Curve, draw_chart


def drawn(*curves: Curve, **options: object) -> str:
    chart = Chart("t", "", "higher", curves, **options)  # pyright: ignore[reportArgumentType]
    return draw_chart(chart, {curve.name: k + 3 for k, curve in enumerate(curves)})


def dots(svg: str, place: int) -> list[tuple[float, float]]:
    group = re.search(rf'<g class="mark-symbol role-mark curve{place}_dot_marks".*?</g>', svg)
    assert group is not None
    return [(float(x), float(y)) for x, y in re.findall(r"translate\(([-\d.]+),([-\d.]+)\)", group[0])]


def test_chart_draws_values_where_they_belong() -> None:
    curve = Curve("a", (0.0, 0.5, 1.0), (0.0, 0.4, 1.0), (0.0, 0.6, 1.0))
    svg = drawn(curve)
    assert dots(svg, 0) == [(0, 250), (211, 125), (422, 0)]
    band = re.search(r'curve0_band_marks".*?d="([^"]+)"', svg)
    assert band is not None
    assert band[1] == "M0,250L211,150L422,0L422,0L211,100L0,250Z"
    assert "var(--c3)" in svg
    chart = Chart("t", "", "higher", (curve,))
    assert [chart.across(k) * 480 for k in (1, 2, 3)] == pytest.approx([LEFT, LEFT + 211, LEFT + 422])
    assert f"translate({LEFT},{TOP})" in svg
    assert f'viewBox="0 0 480 {HEIGHT}"' in svg


def test_chart_breaks_at_gaps_and_cuts_at_the_floor() -> None:
    curve = Curve("a", (1.0, 0.5, None, 0.25, -9.0), (0.9, 0.4, None, 0.2, -9.5), (1.0, 0.6, None, 0.3, -8.5))
    svg = drawn(curve, zero=True, floor=-0.5)
    for mark in ("line", "band"):
        path = re.search(rf'curve0_{mark}_marks".*?d="([^"]+)"', svg)
        assert path is not None
        assert path[1].count("M") == 2, mark
    assert len(dots(svg, 0)) == 4
    assert dots(svg, 0)[-1][1] == 250, "along the floor"
    assert svg.count("zero_marks") == 1


def test_chart_tells_baselines_ceiling_and_events() -> None:
    curves = (Curve("a", (0.5, 0.5), kind="baseline"), Curve("b", (0.4, 0.4)), Curve("c", (0.9, 0.9), kind="ceiling"))
    svg = drawn(*curves, events=(2,), limits=(0.0, 1.0))
    dashes = re.findall(r'stroke-dasharray="([^"]+)"', svg)
    assert dashes == ["6,4", "1,0", "1.5,4"]
    assert [dots(svg, k)[0][1] for k in range(3)] == [125, 150, 25], "on the axis that was asked for"
    event = re.search(r'event_marks".*?translate\(([\d.]+),', svg)
    assert event is not None
    assert float(event[1]) == 422


def test_a_ceiling_far_off_is_named_and_does_not_flatten_the_rest() -> None:
    curves = (Curve("a", (25.0, 35.0)), Curve("top", (54.0, 54.0), kind="ceiling"))
    chart = Chart("PSNR", "dB", "higher", curves)
    assert chart.beyond == ("top",)
    svg = drawn(*curves)
    assert "curve1" not in svg
    assert [y for _, y in dots(svg, 0)] == [250, 0]
    near = Curve("top", (37.0, 37.0), kind="ceiling")
    assert Chart("PSNR", "dB", "higher", (curves[0], near)).beyond == ()


def test_same_chart_same_bytes_and_nothing_from_outside() -> None:
    curves = (Curve("a", (0.5, 0.75), (0.4, 0.7), (0.6, 0.8)),)
    assert drawn(*curves) == drawn(*curves)
    assert "http" not in drawn(*curves)
    assert 'id="' not in drawn(*curves), "many charts on one page"


def test_a_chart_of_one_step_or_one_value() -> None:
    assert dots(drawn(Curve("a", (0.25,))), 0) == [(211, 125)]
    assert [x for x, _ in dots(drawn(Curve("a", (0.0, 0.0)), zero=True), 0)] == [0, 422]


def test_chart_needs_values_of_one_length() -> None:
    for curves in ((), (Curve("a", (None, None)),), (Curve("a", (1.0,)), Curve("b", (1.0, 2.0)))):
        with pytest.raises(ValueError, match="curves of one length with a value"):
            draw_chart(Chart("t", "", "higher", curves), {"a": 0, "b": 1})
