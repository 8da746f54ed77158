"""What the explorer says, computed without a page."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.catalog import Catalog, ago, change, compare, duration, figure, flatten, headline, select, size
from dashboards.charts import line_chart, metric_names, points
from dashboards.graph import Place, layers, lineage_svg, positions
from dashboards.pages.artifact import metrics_of, with_file_addresses
from dashboards.preview import TEXT_BYTES, preview
from infra.artifact import MANIFEST
from infra.lineage import lineage


def test_the_listing_is_newest_first_with_tags_and_headlines(line: Any) -> None:
    rows = Catalog.read(line.store).rows(datetime.now(UTC))
    assert [row["id"] for row in rows] == [line.report, line.other, line.base, line.documents]
    base = rows[2]
    assert (base["kind"], base["stage"], base["tags"], base["ago"]) == (
        "checkpoint", "pretrain", "base@latest", "just now"
    )  # fmt: skip
    assert base["headline"] == "loss 0.0005 · parameters 1\u202f234\u202f567"
    assert base["bytes"] == line.store.manifest(line.base).bytes


def test_an_unreadable_artifact_is_listed_as_broken_beside_the_rest(line: Any) -> None:
    (line.store.get(line.other).path / MANIFEST).write_text("{")
    catalog = Catalog.read(line.store)
    assert list(catalog.broken) == [line.other]
    assert len(catalog.manifests) == 3


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"text": "PRETRAIN"}, ["other", "base"]),
        ({"text": "base@ loss"}, ["base"]),
        ({"kinds": ["report", "documents"]}, ["report", "documents"]),
        ({"stages": ["pretrain"], "tagged": True}, ["base"]),
        ({"text": "nothing like it"}, []),
    ],
)
def test_a_filter_keeps_rows_with_every_word_of_the_kinds_and_stages(
    choice: dict[str, Any], expected: list[str], line: Any
) -> None:
    rows = Catalog.read(line.store).rows(datetime.now(UTC))
    assert [row["id"] for row in select(rows, **choice)] == [getattr(line, name) for name in expected]


def test_what_was_made_of_an_artifact_is_found_with_its_role(line: Any) -> None:
    catalog = Catalog.read(line.store)
    assert [(role, m.id) for role, m in catalog.children(line.documents)] == [
        ("documents", line.base), ("documents", line.other)
    ]  # fmt: skip
    assert catalog.children(line.report) == []


def test_two_artifacts_differ_in_the_fields_that_differ(line: Any) -> None:
    base, other = (line.store.manifest(i) for i in (line.base, line.other))
    found = {(d.section, d.field): d for d in compare(base, other)}
    rate = found["config", "learning_rate"]
    assert (rate.left, rate.right, rate.change) == ("0.01", "0.02", "+0.01 (+100.0 %)")
    assert found["summary", "loss"].change == "+0.0005 (+100.0 %)"
    assert ("config", "steps") not in found
    assert ("summary", "parameters") not in found
    assert {section for section, _ in found} == {"config", "summary", "provenance"}
    assert compare(base, base) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (True, "yes"),
        (12345, "12\u202f345"),
        (0.123456, "0.1235"),
        (27000.4, "27\u202f000"),
        (2.7e13, "2.7e+13"),
        ("x", "x"),
    ],
)
def test_figures_read_well(value: Any, text: str) -> None:
    assert figure(value) == text


def test_sizes_and_times_read_well() -> None:
    now = datetime.now(UTC)
    assert [size(n) for n in (0, 1023, 1024, 5 << 20, 3 << 40)] == ["0 B", "1023 B", "1 KiB", "5 MiB", "3 TiB"]
    assert [duration(s) for s in (0.04, 61, 3600)] == ["0.0 s", "1 min 01 s", "1 h 00 min"]
    assert [ago(now - timedelta(seconds=s), now) for s in (3, 61, 7300, 200000)] == [
        "just now", "1 min ago", "2 h ago", "2 d ago"
    ]  # fmt: skip
    assert change(0, 3) == "+3"
    assert change("a", "b") == change(True, False) == ""
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == [("a.b", 1), ("a.c", {}), ("d", [1])]
    assert headline({"a": None, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5}) == "b 1 · c 2 · d 3 · e 4"


# ---- charts


def test_metrics_are_read_from_the_artifact_and_nan_leaves_no_point(line: Any) -> None:
    rows = metrics_of(line.store, line.store.manifest(line.base))
    assert metric_names(rows) == ["loss"]
    assert [step for step, _ in points(rows, "loss")] == [1, *range(3, 21)]
    assert metrics_of(line.store, line.store.manifest(line.documents)) == []


@given(st.integers(2, 400), st.integers(2, 50))
def test_a_long_line_is_thinned_but_keeps_its_ends(n: int, limit: int) -> None:
    rows = [{"step": step, "loss": 1.0} for step in range(n)]
    found = points(rows, "loss", limit)
    assert len(found) == min(n, limit)
    assert (found[0][0], found[-1][0]) == (0, n - 1)
    assert [x for x, _ in found] == sorted({x for x, _ in found})


def test_a_chart_of_two_runs_has_two_lines_and_a_legend() -> None:
    rows = [{"step": 1, "loss": 2.0}]
    options = line_chart("loss", {"a": rows, "b": rows})
    assert [s["name"] for s in options["series"]] == ["a", "b"]
    assert options["legend"]["show"]
    assert not line_chart("loss", {"": rows})["legend"]["show"]


# ---- the drawing


@given(st.data())
def test_every_edge_of_a_drawing_goes_right_and_no_place_covers_another(data: st.DataObject) -> None:
    ids = [f"n{i}" for i in range(data.draw(st.integers(1, 12)))]
    pairs = [(a, b) for i, a in enumerate(ids) for b in ids[i + 1 :]]
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    columns = layers(ids, edges)
    home = {place.id: n for n, column in enumerate(columns) for place in column if not place.lane}
    assert sorted(home) == sorted(ids)
    for parent, child in edges:
        assert home[parent] < home[child]
        assert all(Place(parent, lane=True) in columns[n] for n in range(home[parent] + 1, home[child]))
    places, width, height = positions(columns)
    for n, column in enumerate(columns):
        middles = [places[place, n][1] for place in column]
        assert all(b - a >= 18 for a, b in pairwise(middles))
        assert all(0 < x < width and 0 < y < height for x, y in (places[place, n] for place in column))


def test_a_diamond_has_no_crossing() -> None:
    columns = layers(list("abcdef"), [("a", "c"), ("b", "d"), ("c", "e"), ("d", "f")])
    names = [[place.id for place in column] for column in columns]
    assert [["abcdef".index(i) % 2 for i in column] for column in names] in ([[0, 1]] * 3, [[1, 0]] * 3)


def test_the_drawing_links_every_node_escapes_and_marks_the_artifact_and_what_was_collected(line: Any) -> None:
    line.store.fs.rm(f"{line.store.root}/artifacts/{line.documents}", recursive=True)
    svg = lineage_svg(lineage(line.store, line.report, "up").to_json(line.store.tags()), line.report)
    assert f'class="node here" href="/artifact/{line.report}"' in svg
    assert f'href="/artifact/{line.base}"' in svg
    assert line.documents in svg
    assert f'href="/artifact/{line.documents}"' not in svg
    assert "&lt;b&gt;bold&lt;/b&gt;" in svg
    assert "<b>" not in svg
    assert svg.count('class="edge') == 2


# ---- files


def test_previews_show_the_beginning_of_every_kind_of_file(line: Any) -> None:
    documents, base, report = (line.store.manifest(i) for i in (line.documents, line.base, line.report))
    table = preview(line.store, documents, "documents-00000.parquet")
    assert (table.form, len(table.rows), table.note) == ("table", 3, "first 3 of 3 rows")
    assert table.rows[1] == {"id": "d1", "text": "文档 number 1"}
    assert preview(line.store, base, "model.json").text == '{\n  "d_model": 64\n}'
    assert preview(line.store, base, "metrics.jsonl").rows[0]["step"] == "1"
    assert preview(line.store, report, "plot.png").form == "image"
    assert preview(line.store, report, "report.md").text.startswith("# Scores")
    assert preview(line.store, report, "page.html").form == "none"


def test_a_file_that_is_not_what_its_name_says_is_said_to_be_unreadable(line: Any) -> None:
    manifest = line.store.manifest(line.documents)
    (line.store.get(line.documents).path / "documents-00000.parquet").write_text("no parquet")
    found = preview(line.store, manifest, "documents-00000.parquet")
    assert found.form == "none"
    assert "cannot be read" in found.note


def test_only_the_beginning_of_a_long_text_is_shown(line: Any) -> None:
    (line.store.get(line.report).path / "report.md").write_text("x" * (TEXT_BYTES + 5))
    found = preview(line.store, line.store.manifest(line.report), "report.md")
    assert len(found.text) == TEXT_BYTES
    assert found.note == "first 20 kB"


def test_a_reports_pictures_are_served_and_other_links_stay(line: Any) -> None:
    text = with_file_addresses("![a](plot.png) [b](https://example.org/plot.png)", line.store.manifest(line.report))
    assert text == f"![a](/files/{line.report}/plot.png) [b](https://example.org/plot.png)"
