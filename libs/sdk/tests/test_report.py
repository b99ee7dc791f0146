"""The report: one page that stands alone, whatever the rollout was."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest
from lepton.evidence import duration, figure
from lepton.policies import PRESETS
from lepton.report import page
from lepton.report_plots import collect, wilson
from lepton.report_svg import Mark, Plot, Scale, bin_width_s
from lepton.rollouts import Decision, Rollout, WindowPoint

from libs.sdk.tests import stories
from libs.sdk.tests.stories import Story


def parsed(rollout: Rollout, decisions: Sequence[Decision], windows: Sequence[WindowPoint]) -> ET.Element:
    """The page's elements: it is XML but for its first line."""
    doctype, _, document = page(rollout, decisions, windows).partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return ET.fromstring(document)


def text_of(element: ET.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


@pytest.mark.parametrize("story", [stories.good(), stories.bad()], ids=["good", "bad"])
@pytest.mark.parametrize("look", [0, -1], ids=["under way", "ended"])
def test_the_page_is_well_formed_needs_no_network_and_has_every_decision(story: Story, look: int) -> None:
    root = parsed(story.looks[look], story.decisions, story.windows)
    table = next(each for each in root.iter("table") if each.get("class") == "decisions")
    rows = [[text_of(cell) for cell in row.findall("td")] for row in table.findall("tbody/tr")]
    assert [row[0] for row in rows] == [str(each.number) for each in story.decisions]
    for row, decision in zip(rows, story.decisions, strict=True):
        assert decision.reason in row[-1]
    source = page(story.looks[look], story.decisions, story.windows)
    assert not re.search(r"https?:|//\w|@import|url\(|<script|<link|<img|src=", source)


def test_the_head_says_how_it_ended_who_began_it_and_by_which_policy() -> None:
    story = stories.bad()
    text = text_of(parsed(story.looks[-1], story.decisions, story.windows))
    assert "digits version 3 against version 2 rolled back" in text
    assert "digits version 3 was taken back after 6 s: errors: 31 of 94 requests failed" in text
    assert "2026-01-02 03:04:05 UTC by alice" in text
    assert "canary: 5, 25, 50, 100 %, at least 4 s each" in text


def test_what_users_saw_adds_up_to_the_windows_since_the_start() -> None:
    story = stories.bad()
    table = next(
        each for each in parsed(story.looks[-1], (), story.windows).iter("table") if each.get("class") == "numbers"
    )
    rows = {text_of(row[0]): [text_of(cell) for cell in row[1:]] for row in table.findall("tbody/tr")}
    for version in (2, 3):
        seen = [each for each in story.windows if each.version == version and each.at >= stories.START]
        requests, failed = sum(each.requests for each in seen), sum(each.server_errors for each in seen)
        refused = sum(each.client_errors for each in seen)
        assert rows[f"version {version}"][:3] == [f"{requests:,}", f"{refused:,}", f"{failed:,}"]


def test_refused_requests_are_told_where_there_are_any() -> None:
    story = stories.bad()
    assert ", refused" not in text_of(parsed(story.looks[-1], story.decisions, story.windows))
    windows = [
        each.model_copy(update={"client_errors": each.ok, "ok": 0}) if each.version == 3 else each
        for each in story.windows
    ]
    told = parsed(story.looks[-1], story.decisions, windows)
    assert "version 3, refused" in text_of(told)
    plot = next(each for each in told.iter("svg") if each.get("aria-label") == "Requests that failed")
    assert "100 %" in text_of(plot)


def test_all_four_plots_are_there_with_marks_of_the_decisions() -> None:
    story = stories.good()
    plots = {
        each.get("aria-label"): each for each in parsed(story.looks[-1], story.decisions, story.windows).iter("svg")
    }
    assert list(plots) == ["Share of the live traffic", "Requests that failed", "Latency", "Evidence"]
    titles = " ".join(text_of(each) for each in plots["Share of the live traffic"].iter("title"))
    for decision in story.decisions:
        assert f"{decision.number}: {decision.action}: {decision.reason}" in titles
    assert "taken back from 120 on" in text_of(plots["Evidence"])
    assert "proved from 20 on" in text_of(plots["Evidence"])


def test_a_rollout_that_has_only_begun_is_a_page_too() -> None:
    root = parsed(stories.good().looks[0], (), ())
    assert "Nothing was decided yet." in text_of(root)
    assert [each.get("aria-label") for each in root.iter("svg")] == ["Share of the live traffic"]


def test_what_people_wrote_is_text_and_no_markup() -> None:
    decided = stories.decision(1, 0, "abort", 0, 0, '<script>alert("x")</script> & more', actor="<b>eve</b>")
    rollout = stories.bad().looks[-1].model_copy(update={"reason": "<i>bad</i>", "actor": "a&b"})
    root = parsed(rollout, [decided], ())
    assert not [*root.iter("script"), *root.iter("b")]
    assert '<script>alert("x")</script> & more' in text_of(root)


def test_forced_requests_are_no_part_of_the_plots() -> None:
    forced = stories.point(1, 2, 1000, 1000, 5.0).model_copy(update={"forced": True})
    assert not collect(stories.good().looks[-1], (), [forced]).bins


def test_no_point_lies_outside_its_plot() -> None:
    story = stories.good()
    for svg in parsed(story.looks[-1], story.decisions, story.windows).iter("svg"):
        width, height = map(float, str(svg.get("viewBox")).split()[2:])
        for shape in (*svg.iter("polyline"), *svg.iter("polygon")):
            for pair in str(shape.get("points")).split():
                x, y = map(float, pair.split(","))
                assert 0 <= x <= width
                assert 0 <= y <= height


# --- the parts --------------------------------------------------------------------------------------------------------


def test_many_hours_of_seconds_become_at_most_120_points() -> None:
    windows = [stories.point(second, 2, 10, 0, 2.0) for second in range(0, 36_000, 7)]
    data = collect(stories.good().looks[-1], (), windows)
    assert len(data.bins[2]) <= 120
    assert sum(each.requests for each in data.bins[2]) == 10 * len(windows)


@pytest.mark.parametrize(("span_s", "width_s"), [(1, 1), (120, 1), (121, 2), (3600, 30), (172_800, 1800)])
def test_bins_are_of_round_length(span_s: float, width_s: int) -> None:
    assert bin_width_s(span_s) == width_s


@pytest.mark.parametrize(
    ("errors", "requests", "low", "high"),
    [(0, 0, 0, 1), (0, 100, 0, 0.037), (1, 100, 0.0018, 0.0545), (5, 5, 0.5655, 1)],
)
def test_the_interval_is_wilsons(errors: int, requests: int, low: float, high: float) -> None:
    assert wilson(errors, requests) == pytest.approx((low, high), abs=1e-4)


def test_ticks_are_round_and_few() -> None:
    assert Scale(0, 5.3, 0, 100).ticks() == [0, 2, 4]
    assert Scale(0, 100, 0, 100).ticks() == [0, 25, 50, 75, 100]
    assert Scale(0.1, 1e4, 0, 100, log=True).ticks() == [0.1, 1, 10, 100, 1000, 10_000]
    assert len(Scale(0.1, 1e12, 0, 100, log=True).ticks()) <= 6


def test_marks_that_are_close_share_a_badge() -> None:
    plot = Plot("x", 0, 100, 0, 1, badges=True)
    svg = plot.svg([Mark(10, 1, "a"), Mark(10.5, 2, "b"), Mark(50, 3, "c")])
    assert re.findall(r'class="badge-text"[^>]*>([^<]+)<', svg) == ["1\N{EN DASH}2", "3"]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (5400, "1 h 30 min")],
)
def test_lengths_of_time_are_told_in_two_units(seconds: float, told: str) -> None:
    assert duration(seconds) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [(0, "0"), (0.25, "0.25"), (1234.5, "1,234"), (41_250, "41,250"), (2.5e9, "2.5e+09"), (1e-6, "1.0e-06")],
)
def test_numbers_are_told_for_people(value: float, told: str) -> None:
    assert figure(value) == told


def test_the_whole_policy_is_in_the_page() -> None:
    story = stories.good()
    (pre,) = parsed(story.looks[-1], (), ()).iter("pre")
    assert f"cool_down_s: {PRESETS['fast'].cool_down_s:g}" in text_of(pre)
