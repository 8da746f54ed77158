"""The README's benchmark tables are those of the kept results."""

import json

from benchmarks import record, tables


def test_the_readme_shows_the_kept_results():
    text = (tables.ROOT / "README.md").read_text()
    assert tables.TABLE.search(text)
    assert tables.rewritten(text) == text


def test_every_kept_result_has_the_fields_that_a_reader_needs():
    paths = [
        path
        for path in sorted((tables.ROOT / "benchmarks").glob("*/results/*.json"))
        if "rows" in json.loads(path.read_text())
    ]
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        assert {"device", "versions", "commit", "command", "rows"} <= result.keys(), path
        for row in result["rows"]:
            assert {"case", "metric", "ours", "anchors"} <= row.keys(), path


def test_a_command_leaves_out_where_its_results_went():
    given = ["--recipe", "h100", "--out", "x", "--commit=c0ffee", "--set", "a.b=1"]
    assert record.command("line.py", given) == "python line.py --recipe h100 --set a.b=1"


def test_a_table_gives_our_ratio_to_each_anchor():
    result = {
        **{"device": "a GPU", "commit": "0123456789", "command": "make it"},
        "rows": [
            {"case": "a", "metric": "tokens_per_second", "ours": 3000.0, "anchors": {"one": 1500.0, "other": 4000.0}},
            {"case": "b", "metric": "x", "ours": 0.5, "anchors": {"one": 0.25}},
        ],
    }
    header, _, first, second, _, source = tables.table(result).splitlines()
    assert header == "| case | metric | Fathom | × one | × other |"
    assert first == "| a | tokens per second | 3,000 | 2.00 (1,500) | 0.75 (4,000) |"
    assert second == "| b | x | 0.5 | 2.00 (0.25) |  |"
    assert source == "a GPU, commit 0123456: `make it`"
