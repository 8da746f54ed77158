"""The command line: shapes of its JSON, its exit codes, its messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app


def fathom(store: Path, *arguments: str, **options: object) -> Result:
    result = CliRunner().invoke(app, list(arguments), env={"FATHOM_STORE": str(store)}, **options)  # type: ignore[arg-type]
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_list_gives_every_artifact_with_its_tags_inputs_and_size(made_store: Path) -> None:
    rows = json.loads(fathom(made_store, "artifacts", "list", "--json").stdout)
    assert len(rows) == 5
    assert all({"id", "kind", "stage", "created", "tags", "inputs", "summary", "bytes"} <= set(row) for row in rows)
    sums = next(row for row in rows if row["stage"] == "total")
    assert sums["tags"] == ["sums@latest"]
    assert set(sums["inputs"]) == {"parts.squares", "parts.cubes"}
    assert sums["summary"] == {"total": 14 + 4356, "parts": 2}
    reports = json.loads(fathom(made_store, "artifacts", "list", "--kind", "report", "--json").stdout)
    assert [row["id"] for row in reports] == [sums["id"]]
    assert sums["id"] in fathom(made_store, "artifacts", "list").stdout


def test_show_gives_the_whole_manifest(made_store: Path) -> None:
    shown = json.loads(fathom(made_store, "artifacts", "show", "cubes@latest", "--json").stdout)
    assert shown["config"] == {"power": 3, "seconds": 0.0}
    assert {file["path"] for file in shown["files"]} == {"numbers.txt", "powers.png"}
    assert shown["provenance"]["labels"] == {"node": "cubes"}
    text = fathom(made_store, "artifacts", "show", "cubes@latest").stdout
    assert "largest" in text
    assert "power" in text


def test_lineage_is_nodes_and_edges(made_store: Path) -> None:
    graph = json.loads(fathom(made_store, "artifacts", "lineage", "sums@latest", "--json").stdout)
    assert len(graph["nodes"]) == 5
    assert len(graph["edges"]) == 4
    down = json.loads(
        fathom(made_store, "artifacts", "lineage", "small@latest", "--direction", "down", "--json").stdout
    )
    assert len(down["nodes"]) == 3


def test_diff_names_the_fields(made_store: Path) -> None:
    found = json.loads(fathom(made_store, "artifacts", "diff", "squares@latest", "cubes@latest", "--json").stdout)
    assert {"field": "config.power", "left": 2, "right": 3} in found


def test_a_tag_can_be_given_moved_and_taken_away(store_copy: Path) -> None:
    assert fathom(store_copy, "artifacts", "tag", "best", "cubes@latest").exit_code == 0
    best = json.loads(fathom(store_copy, "artifacts", "show", "best", "--json").stdout)
    assert "best" in best["tags"]
    assert fathom(store_copy, "artifacts", "untag", "best").exit_code == 0
    assert fathom(store_copy, "artifacts", "show", "best").exit_code == 4


def test_verify_names_the_file_that_differs(store_copy: Path) -> None:
    assert fathom(store_copy, "artifacts", "verify").exit_code == 0
    shown = json.loads(fathom(store_copy, "artifacts", "show", "cubes@latest", "--json").stdout)
    (store_copy / "artifacts" / shown["id"] / "numbers.txt").write_text("7")
    result = fathom(store_copy, "artifacts", "verify", "--json")
    assert result.exit_code == 5
    assert [(f["id"], f["path"]) for f in json.loads(result.stdout)["faults"]] == [(shown["id"], "numbers.txt")]


def test_gc_deletes_only_what_no_tag_reaches(store_copy: Path) -> None:
    fathom(store_copy, "artifacts", "untag", "sums@latest")
    dry = json.loads(fathom(store_copy, "artifacts", "gc", "--dry-run", "--json").stdout)
    assert [row["id"].partition("/")[0] for row in dry["artifacts"]] == ["total"]
    assert fathom(store_copy, "artifacts", "gc", input="n\n").exit_code == 1
    assert len(json.loads(fathom(store_copy, "artifacts", "list", "--json").stdout)) == 5
    assert fathom(store_copy, "artifacts", "gc", "--yes").exit_code == 0
    assert len(json.loads(fathom(store_copy, "artifacts", "list", "--json").stdout)) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "lin"], 2, "no pipeline 'lin'; did you mean 'line'"),
        (["plan", "line", "--recipe", "huge"], 2, "no recipe 'huge'"),
        (["run", "line", "--set", "pretrain.stepz=3"], 2, "no field 'stepz'; did you mean 'steps'"),
        (["run", "corpus", "--set", "pretrain.steps=3"], 2, "no node or stage 'pretrain'"),
        (["run", "corpus", "--until", "tokenise"], 2, "did you mean 'tokenize'"),
        (["stage", "pretran"], 2, "did you mean 'pretrain'"),
        (["stage", "generate_problems", "--input", "tokens"], 2, "role=id"),
        (["stage", "generate_problems", "--input", "tokens=abc"], 2, "takes no input 'tokens'"),
        (["stage", "generate_problems", "--config", "absent.yaml"], 2, "No such file"),
        (["stage", "grpo", "--input", "checkpoint=x", "--input", "problems=y"], 4, "no artifact or tag 'x'"),
        (["stage", "grpo"], 2, "grpo needs input checkpoint (checkpoint), problems (problems)"),
        (["artifacts", "show", "nothing"], 4, "no artifact or tag 'nothing'"),
        (["chat", "cubes@latest"], 3, "chat needs a checkpoint"),
        (["artifacts", "lst"], 2, "No such command"),
    ],
)
def test_a_mistake_is_one_message_and_its_exit_code(
    made_store: Path, arguments: list[str], code: int, message: str
) -> None:
    result = fathom(made_store, *arguments)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_plan_is_machine_readable_and_says_why(tmp_path: Path) -> None:
    steps = json.loads(fathom(tmp_path, "plan", "corpus", "--json").stdout)
    assert steps[0]["node"] == "ingest_api_zh"
    assert all({"node", "stage", "id", "state", "why", "inputs", "config"} <= set(step) for step in steps)
    blocked = fathom(tmp_path, "plan", "corpus", "--only", "tokenize", "--json")
    assert blocked.exit_code == 4
    assert json.loads(blocked.stdout)[-1]["state"] == "blocked"


@pytest.mark.parametrize("command", [[], ["run"], ["plan"], ["stage"], ["chat"], ["up"], ["artifacts", "list"]])
def test_help_has_an_example(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "fathom " in result.output
