"""The report page: what is shown, escaped, left out and refused, and that nothing is asked for from outside."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise

import av
import numpy as np
import pytest

from data import picture
from data.chart import Chart, Curve
from data.errors import PageSizeError
from data.page import build_page, count, duration, number, signed
from data.page_content import (
    Clip,
    Column,
    Difference,
    Figure,
    Gallery,
    Interval,
    PageContent,
    PictureTable,
    Provenance,
    PublishedRow,
    Quarantined,
    Row,
    StepTable,
    Study,
    Table,
    TeacherRow,
    Tile,
    Timing,
)

HOSTILE = "<script>alert('x')</script>&\"</title>"
COLUMNS = (Column("psnr", "PSNR dB", "higher", 2), Column("lpips", "LPIPS", "lower", 4), Column("base", "By chance"))


def film(shade: int, t: int = 5, h: int = 18, w: int = 26) -> np.ndarray:
    frames = np.full((t, h, w, 3), shade, dtype=np.uint8)
    frames[:, :, : w // 2, 0] = 255 - shade
    return frames


def event_chart() -> Chart:
    return Chart("Collision", "", "neither", (Curve("warp", (0.1, 0.7, 0.2)),), limits=(0.0, 1.0), events=(2,))


def content(**changes: object) -> PageContent:
    curves = (
        Curve("copy_last", (0.0, 0.0, 0.0), kind="baseline"),
        Curve("warp", (0.5, None, 0.25), (0.4, None, 0.2), (0.6, None, 0.3)),
    )
    whole = PageContent(
        title="Report",
        summary="What came out.",
        facts=(("protocol", "demo"),),
        skill_steps=(1, 3),
        rows=(
            Row("copy_last", "baseline", Interval(0.0, 0.0, 0.0), (0.0, 0.0), {"psnr": 33.6}),
            Row("advect", "baseline", Interval(0.4, 0.3, 0.5), (0.6, 0.3)),
            Row(
                "warp",
                "predictor",
                Interval(-0.125, -0.25, 0.0625),
                (0.5, None),
                {"psnr": 36.125},
                advantage=Interval(0.1, 0.05, 0.15),
                parameters=1_234_567,
                frames_per_second=61.5,
                seconds_trained=7800.0,
            ),
            Row("vae", "ceiling", Interval(0.9), (0.8, 0.95)),
        ),
        columns=COLUMNS,
        tables=(
            StepTable("Skill by step", "All of it.", (("warp", (Interval(0.5, 0.4, 0.6), Interval(0.25))),)),
            StepTable(
                "Against advect",
                "Differences.",
                (("warp", (Interval(0.1, 0.05, 0.15), Interval(-0.2, -0.3, -0.1), Interval(0.0, -0.1, 0.1))),),
                signed=True,
                remarks=("warp beats advect at step 1.",),
            ),
            Table(
                "Ablations",
                "One option.",
                ("Predictor", "Change", "Skill", "Difference"),
                (
                    ("warp", "as it is", Interval(0.5, 0.4, 0.6), None),
                    ("bare", "a: 1 to 2", Interval(0.1), Difference(-0.4, -0.5, -0.3)),
                ),
                remarks=("bare falls behind.",),
            ),
        ),
        charts=(Chart("Skill", "", "higher", curves, zero=True),),
        clips=(Clip("sim_00010", 8, "most motion", 2, 12.5, film(60), (Tile("warp", film(80), "skill 0.1"),)),),
        films_note="Chosen by rule.",
        studies=(
            Study(
                "Boxes",
                "White is true.",
                (
                    (
                        PictureTable("most motion", ("step 1", "step 3"), (("warp", (picture.flow_legend(8),) * 2),)),
                        (event_chart(),),
                    ),
                ),
                Figure("the key", picture.flow_legend(12)),
            ),
        ),
        teachers=(TeacherRow("dis", 0.2, 0.6, None, 0.64),),
        galleries=(Gallery("Flow", "Colours.", (Figure("the wheel", picture.flow_legend(16)),)),),
        quarantine=(Quarantined("video_10800", "acquire", "annotation is broken"),),
        timings=(Timing("decode", 8.0, 400, "frames"), Timing("report", 0.0)),
        provenance=(Provenance("Parameters", "seed: 0\n  x: <1>"),),
        definitions=(("skill", "1 - a / b"),),
    )
    return replace(whole, **changes)


@cache
def whole_page() -> str:
    return build_page(content())


class Reader(HTMLParser):
    """Checks that elements nest, and gathers text, rows of tables, attributes that load something."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.links += [v for k, v in attrs if k in ("src", "href", "poster", "data", "action", "srcset") and v]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = (self.rows[-1][-1] + data).lstrip()


def test_page_asks_for_nothing_from_outside() -> None:
    page = whole_page()
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page
    assert all(link.startswith(("data:", "#")) for link in Reader(page).links)
    shell = re.sub(r"data:[a-z/0-9]+;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|XMLHttpRequest|import\(", shell)


def test_same_content_same_bytes() -> None:
    assert build_page(content()) == whole_page()


def test_everything_is_escaped() -> None:
    page = build_page(
        content(
            title=HOSTILE,
            summary=HOSTILE,
            facts=((HOSTILE, HOSTILE),),
            rows=(Row(HOSTILE, "predictor", Interval(0.1), (0.1, 0.1)),),
            columns=(Column("psnr", HOSTILE),),
            published=(PublishedRow(HOSTILE, 1.0, None, None, None, None, HOSTILE),),
            published_note=HOSTILE,
            tables=(
                StepTable(HOSTILE, HOSTILE, ((HOSTILE, (Interval(0.1),)),), remarks=(HOSTILE,)),
                Table(HOSTILE, HOSTILE, (HOSTILE,), ((HOSTILE,),), remarks=(HOSTILE,), folded=True),
            ),
            films_note=HOSTILE,
            studies=(
                Study(
                    HOSTILE,
                    HOSTILE,
                    ((PictureTable(HOSTILE, (HOSTILE,), ((HOSTILE, (picture.flow_legend(4),)),)), ()),),
                ),
            ),
            charts=(Chart(HOSTILE, HOSTILE, "lower", (Curve(HOSTILE, (1.0, 2.0)),)),),
            clips=(Clip(HOSTILE, 0, HOSTILE, 2, 12.5, film(1), (Tile(HOSTILE, film(2), HOSTILE),)),),
            teachers=(TeacherRow(HOSTILE, None, None, None, None),),
            galleries=(Gallery(HOSTILE, HOSTILE, (Figure(HOSTILE, picture.flow_legend(4)),)),),
            quarantine=(Quarantined(HOSTILE, HOSTILE, HOSTILE),),
            timings=(Timing(HOSTILE, 1.0, 1, HOSTILE, HOSTILE),),
            provenance=(Provenance(HOSTILE, HOSTILE),),
            definitions=((HOSTILE, HOSTILE),),
        )
    )
    assert "<script>alert" not in page
    assert page.count("<script>") == 1
    assert HOSTILE in "".join(Reader(page).text)


def test_headline_table_in_the_order_given() -> None:
    rows = Reader(whole_page()).rows
    assert [row[0].split()[0] for row in rows[1:5]] == ["copy_last", "advect", "warp", "vae"]
    assert [row[0].split()[-1] for row in rows[1:5]] == ["baseline", "baseline", "warp", "ceiling"]
    minus, absent = "\N{MINUS SIGN}", "\N{EN DASH}"
    assert rows[3] == [
        "warp",
        f"{minus}0.125 [{minus}0.250, 0.062]",
        "",
        "0.50",
        absent,
        "+0.100 [0.050, 0.150]",
        "36.12",
        "1.23 M",
        "61.5",
        "2 h 10 min",
    ]
    assert rows[4][1] == "0.900", "no interval, no brackets"
    assert len({len(row) for row in rows[:5]}) == 1


def test_absent_is_said_and_never_zero() -> None:
    bare = content(
        tables=(),
        charts=(),
        clips=(),
        studies=(),
        teachers=(),
        galleries=(),
        quarantine=(),
        timings=(),
        provenance=(),
        definitions=(),
    )
    page = build_page(bare)
    reader = Reader(page)
    sections = [attrs["id"] for tag, attrs in reader.tags if tag == "section"]
    assert sections == ["headline", "quarantine"]
    assert "none" in [text.strip() for text in reader.text]
    assert "nan" not in " ".join(reader.text).lower()
    anchors = {link[1:] for link in reader.links if link.startswith("#")}
    assert anchors == {"headline", "quarantine"}


def test_columns_of_what_was_measured() -> None:
    copy, advect, warp, vae = content().rows
    rows = (
        copy,
        advect,
        replace(warp, figures={"psnr": 30.0, "base": math.nan}),
        replace(vae, figures={"lpips": 0.0123}),
    )
    found = Reader(build_page(content(rows=rows))).rows
    assert len({len(row) for row in found[:5]}) == 1
    assert found[0][6:8] == ["PSNR dB \N{UPWARDS ARROW}", "LPIPS \N{DOWNWARDS ARROW}"]
    absent = "\N{EN DASH}"
    assert [row[6:8] for row in found[2:5]] == [[absent] * 2, ["30.00", absent], [absent, "0.0123"]]
    assert not any("By chance" in row for row in found), "a column without a number is left out"


def test_published_figures_only_where_given() -> None:
    assert 'id="published"' not in whole_page()
    rows = (PublishedRow("SlotFormer", 30.5, None, 0.0312, 12.25, None, "their table 2"),)
    reader = Reader(build_page(content(published=rows, published_note="Same protocol, other code.")))
    assert ["SlotFormer", "30.50", "0.0312", "12.2", "their table 2"] in reader.rows
    assert "Same protocol, other code." in reader.text
    head = next(row for row in reader.rows if row[0] == "Method")
    assert head == [
        "Method",
        "PSNR \N{UPWARDS ARROW}",
        "LPIPS \N{DOWNWARDS ARROW}",
        "FVD \N{DOWNWARDS ARROW}",
        "Source",
    ]


def test_any_table_marks_differences_alone() -> None:
    page = whole_page()
    reader = Reader(page)
    minus = "\N{MINUS SIGN}"
    assert ["warp", "as it is", "0.500 [0.400, 0.600]", "\N{EN DASH}"] in reader.rows
    assert ["bare", "a: 1 to 2", "0.100", f"{minus}0.400 [{minus}0.500, {minus}0.300]"] in reader.rows
    section = page.split('id="table-3"')[1].split("</section>")[0]
    assert section.count("number below") == 1
    assert "number above" not in section, "a skill above zero is no difference"
    ragged = Table("t", "", ("a", "b"), (("x",),))
    with pytest.raises(ValueError, match=r"table 't' has 2 columns and rows of \[1\]"):
        build_page(content(tables=(ragged,)))


def test_a_study_shows_its_pictures_and_charts() -> None:
    page = whole_page()
    section = page.split('id="study-1"')[1].split("</section>")[0]
    alts = re.findall(r'alt="([^"]+)"', section)
    assert alts == ["the key", "most motion: warp, step 1", "most motion: warp, step 3"]
    assert "true at step 2" in section
    assert section.count("event_marks") == 1


def test_headings_descend_one_by_one() -> None:
    levels = [int(tag[1]) for tag, _ in Reader(whole_page()).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_films_are_compressed_harder_before_a_page_is_too_large() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 96, 3), dtype=np.uint8)
    plain = {"charts": (), "studies": (), "galleries": ()}
    clip = Clip("v", 0, "first", 2, 12.5, noise, (Tile("warp", noise[::-1].copy()),))
    whole = build_page(content(clips=(clip,), **plain))
    assert "compressed harder" not in whole
    smaller = build_page(content(clips=(clip,), **plain), limit_bytes=len(whole.encode()) - 1)
    assert "compressed harder than usual (CRF 24)" in smaller
    assert len(smaller.encode()) < len(whole.encode())
    with pytest.raises(PageSizeError, match=r"more than 0\.01 MB.*\n.*report\.examples"):
        build_page(content(clips=(clip,), **plain), limit_bytes=10_000)
    with pytest.raises(PageSizeError):
        build_page(content(clips=(), **plain), limit_bytes=10_000)


def test_tables_by_step_say_what_excludes_zero() -> None:
    reader = Reader(whole_page())
    minus = "\N{MINUS SIGN}"
    assert ["warp", "0.500 [0.400, 0.600]", "0.250"] in reader.rows
    assert [
        "warp",
        "+0.100 [0.050, 0.150]",
        f"{minus}0.200 [{minus}0.300, {minus}0.100]",
        f"0.000 [{minus}0.100, 0.100]",
    ] in reader.rows
    cells = [attrs["class"] for tag, attrs in reader.tags if tag == "td" and (attrs.get("class") or "")[:6] == "number"]
    assert [name for name in cells if name in ("number above", "number below")] == [
        *["number above"] * 2,  # the first of the headline
        *["number below"] * 2,
    ]
    assert "warp beats advect at step 1." in [text.strip() for text in reader.text]
    ragged = StepTable("t", "", (("a", (Interval(1.0),)), ("b", ())))
    with pytest.raises(ValueError, match=r"table 't' needs rows with the same steps, got \[0, 1\]"):
        build_page(content(tables=(ragged,)))


def test_ten_predictors_have_ten_colours_and_fit_into_a_page() -> None:
    rng = np.random.default_rng(0)
    h, w, t = 128, 192, 16
    waves = np.cumsum(rng.normal(0, 3, (h, w + t, 3)), axis=1) + 120  # rougher than CLEVRER

    def rolled(noise: float) -> np.ndarray:
        moving = np.stack([waves[:, k : k + w] for k in range(t)])
        return (moving + rng.normal(0, noise, moving.shape)).clip(0, 255).astype(np.uint8)

    names = [f"predictor_{k}" for k in range(10)]
    kinds = {"copy_last": "baseline", "advect": "baseline", **dict.fromkeys(names, "predictor"), "vae": "ceiling"}
    rows = tuple(Row(name, kind, Interval(0.5, 0.4, 0.6), (0.5, 0.4)) for name, kind in kinds.items())  # pyright: ignore[reportArgumentType]
    tables = (StepTable("s", "", tuple((name, (Interval(0.5, 0.4, 0.6),) * 12) for name in kinds)),)
    tiles = tuple(Tile(name, rolled(4.0)) for name in list(kinds)[:-1])
    clip = Clip("v", 0, "first", 4, 12.5, rolled(0.0), tiles)
    page = build_page(content(rows=rows, tables=tables, clips=(clip,)))
    assert 3 * len(page) < 25e6, "three such clips and all else"
    colours = re.findall(r"swatch (c\d+)", page.split('class="headline"')[1].split("</table>")[0])
    assert len(set(colours)) == len(kinds)
    for colour in colours:
        assert f".{colour} {{" in page


def test_every_section_has_what_it_was_given() -> None:
    reader = Reader(whole_page())
    ids = {attrs["id"] for _, attrs in reader.tags if attrs.get("id")}
    assert {link[1:] for link in reader.links if link.startswith("#")} <= ids
    text = " ".join(" ".join(reader.text).split())
    for part in (
        "most motion",
        "sim_00010: 2 observed and 3 predicted frames from frame 8 on",
        "skill 0.1",
        "1 item put aside; nothing stands in for it",
        "annotation is broken",
        "the wheel",
        "x: <1>",
    ):
        assert part in text
    assert ["decode", "8.0 s", "", "400 frames", "50 /s", ""] in reader.rows
    assert ["report", "0.0 s", "", "\N{EN DASH}", "\N{EN DASH}", ""] in reader.rows
    assert ["Step", "1", "2", "3"] in reader.rows
    assert ["warp", "0.500", "\N{EN DASH}", "0.250"] in reader.rows
    assert all(attrs.get("alt") for tag, attrs in reader.tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in reader.tags if tag in ("canvas", "input"))


def test_film_holds_truth_prediction_and_error_where_the_page_says() -> None:
    truth, said = film(60), film(100)
    page = build_page(content(clips=(Clip("v", 0, "first", 2, 12.5, truth, (Tile("a", said), Tile("b", truth))),)))
    canvases = [attrs for tag, attrs in Reader(page).tags if tag == "canvas"]
    source = re.search(r'src="data:video/mp4;base64,([^"]+)"', page)
    assert source is not None
    with av.open(io.BytesIO(base64.b64decode(source[1])), "r") as container:
        decoded = np.stack([f.to_ndarray(format="rgb24", src_colorspace="ITU709") for f in container.decode(video=0)])
    error = np.stack([picture.error_picture(a, b) for a, b in zip(said, truth, strict=True)])
    none = np.stack([picture.error_picture(a, a) for a in truth])
    assert len(decoded) == len(truth)
    for canvas, expected in zip(canvases, (truth, said, error, truth, none), strict=True):
        x, y, w, h = (int(canvas[name] or 0) for name in ("data-x", "data-y", "width", "height"))
        assert (h, w) == truth.shape[1:3]
        assert x % 16 == y % 16 == 0
        shown = decoded[:, y : y + h, x : x + w].astype(int)
        assert np.abs(shown - expected)[:, :, [2, 3, 20, 21]].mean() < 4, "apart from the blurred colour edge"


def test_nonsense_is_refused() -> None:
    rows = content().rows
    with pytest.raises(ValueError, match=r"'warp' gives skill at 1 of steps \(1, 3\)"):
        build_page(content(rows=(replace(rows[2], skill_at=(0.1,)),)))
    with pytest.raises(ValueError, match="different names"):
        build_page(content(rows=(rows[0], rows[0])))
    clip = content().clips[0]
    with pytest.raises(ValueError, match=r"sim_00010 \(most motion\) differ in shape"):
        build_page(content(clips=(replace(clip, predictions=(Tile("short", film(1, t=4)),)),)))
    with pytest.raises(ValueError, match="5 observed of 5 frames"):
        build_page(content(clips=(replace(clip, observed=5),)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "\N{EN DASH}"),
        (math.nan, "\N{EN DASH}"),
        (1.0, "1.000"),
        (-0.0001, "0.000"),
        (-1.5, "\N{MINUS SIGN}1.500"),
    ],
)
def test_numbers(value: float | None, expected: str) -> None:
    assert number(value) == expected


def test_signed_numbers() -> None:
    assert [signed(v) for v in (0.25, 0.0001, -0.25, None)] == ["+0.250", "0.000", "\N{MINUS SIGN}0.250", "\N{EN DASH}"]


def test_counts_and_durations() -> None:
    assert [count(v) for v in (0, 950, 999.9, 12_345, 4_560_000, None)] == [
        "0",
        "950",
        "1 k",
        "12.3 k",
        "4.56 M",
        "\N{EN DASH}",
    ]
    assert [duration(v) for v in (0.44, 12.0, 59.7, 185.0, 3599.8, 7800.0)] == [
        "0.4 s", "12 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 10 min",
    ]  # fmt: skip


def test_a_ceiling_that_is_not_drawn_is_named_and_stands_in_the_table() -> None:
    curves = (Curve("a", (25.0, 35.0)), Curve("top", (54.0, 54.0), kind="ceiling"))
    page = build_page(content(charts=(Chart("PSNR", "dB", "higher", curves),)))
    assert "top lies beyond" in page
    assert ["top", "54.000", "54.000"] in Reader(page).rows
