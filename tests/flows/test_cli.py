"""The command line: shapes of its JSON, its exit codes, its messages."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.environment import prepare
from infra.errors import StoreError
from infra.store import ArtifactStore


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
        (["export", "cubes@latest"], 3, "export needs a checkpoint"),
        (["export", "cubes@latest", "/"], 2, "is not an empty folder"),
        (["import", "absent"], 3, "is not a directory"),
        (["serve", "cubes@latest"], 3, "serve needs a checkpoint"),
        (["serve", "cubes@latest", "--engine", "vlm"], 2, "'vlm' is not one of"),
        (["artifacts", "list", "--kind", "checkpoints"], 2, "no kind 'checkpoints'; did you mean 'checkpoint'"),
        (["artifacts", "list", "--stage", "pretran"], 2, "no stage 'pretran'; did you mean 'pretrain'"),
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


@pytest.mark.parametrize(
    ("name", "content"),
    [("broken.toml", b"n_train = = 3"), ("broken.yaml", b"{n_train: 3"), ("latin.yaml", b"name: caf\xe9")],
)
def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    result = fathom(tmp_path / "store", "stage", "generate_problems", "--config", str(tmp_path / name))
    assert result.exit_code == 2
    assert f"--config {tmp_path / name}: " in result.output


def test_chat_refuses_a_damaged_artifact(store_copy: Path) -> None:
    shown = json.loads(fathom(store_copy, "artifacts", "show", "cubes@latest", "--json").stdout)
    (store_copy / "artifacts" / shown["id"] / "numbers.txt").write_text("7")
    assert fathom(store_copy, "chat", "cubes@latest").exit_code == 5


def test_a_store_that_is_a_file_is_named(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_text("")
    result = fathom(store, "up")
    assert result.exit_code == 6
    assert f"store {store}: " in result.output
    assert "set FATHOM_STORE" in result.output
    with pytest.raises(StoreError, match="set FATHOM_STORE"):
        prepare(ArtifactStore(store))


def test_deployments_need_a_server(request: pytest.FixtureRequest) -> None:
    start: Callable[..., subprocess.Popen[str]] = request.getfixturevalue("fathom")
    process = start("run", "toy", "--recipe", "toy", "--deployments")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "start them with fathom up" in output


@pytest.mark.parametrize(("command", "resumes"), [(["stage", "generate_problems"], True), (["down"], False)])
def test_only_what_makes_something_says_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], resumes: bool
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.cli.open_store", interrupt)
    result = fathom(tmp_path, *command)
    assert result.exit_code == 130
    assert "interrupted" in result.output
    assert ("the same command goes on" in result.output) == resumes


def test_a_plan_is_machine_readable_and_says_why(tmp_path: Path) -> None:
    steps = json.loads(fathom(tmp_path, "plan", "corpus", "--json").stdout)
    assert steps[0]["node"] == "ingest_api_zh"
    assert all({"node", "stage", "id", "state", "why", "inputs", "config", "model"} <= set(step) for step in steps)
    blocked = fathom(tmp_path, "plan", "corpus", "--only", "tokenize", "--json")
    assert blocked.exit_code == 4
    assert json.loads(blocked.stdout)[-1]["state"] == "blocked"


@pytest.mark.parametrize(
    ("recipe", "total", "active", "embedding", "tokens", "cache"),
    [
        # Four layers of attention and norms, a dense FFN, three of nine experts and a gate, the last norm, the tables;
        # six experts a layer idle; 64 + 16 numbers cached a layer.
        (
            "tiny",
            4 * (67_584 + 320) + 147_456 + 3 * (9 * 49_152 + 1024) + 128 + 524_288,
            4 * (67_584 + 320) + 147_456 + 3 * (3 * 49_152 + 1024) + 128 + 524_288,
            2 * 2048 * 128,
            640 * 8 * 128,
            2 * 4 * 80,
        ),
        # DeepSeek-V3: 671B and 37B, 14.8T tokens; 61 layers of 576 cached numbers.
        ("v3", 671e9, 37e9, 2 * 129280 * 7168, 14.8e12, 2 * 61 * 576),
    ],
)
def test_a_plan_counts_the_models_that_it_trains_from_random_weights(
    tmp_path: Path, recipe: str, total: float, active: float, embedding: int, tokens: float, cache: int
) -> None:
    arguments = ["plan", "line", "--recipe", recipe]
    steps = {step["node"]: step for step in json.loads(fathom(tmp_path, *arguments, "--json").stdout)}
    counted = [name for name, step in steps.items() if step["model"]]
    assert counted == ["pretrain", "student_base_llama", "student_base_qwen"]
    model = steps["pretrain"]["model"]
    assert model["parameters"] - model["mtp_parameters"] == pytest.approx(total, rel=0.001)
    assert model["active_parameters"] == pytest.approx(active, rel=0.02)
    assert model["embedding_parameters"] == embedding
    assert model["training_tokens"] == pytest.approx(tokens, rel=1e-4)
    assert model["training_flops"] == model["training_flops_per_token"] * model["training_tokens"]
    # 6 FLOPs an active parameter, and as much again for attention and MTP at most.
    assert 1 < model["training_flops_per_token"] / (6 * (model["active_parameters"] - embedding / 2)) < 2
    assert model["cache_bytes_per_token"] == cache
    shown = fathom(tmp_path, *arguments).stdout
    assert all(f"{step['model']['training_flops']:.3g}" in shown for step in steps.values() if step["model"])
    assert "KV cache" not in fathom(tmp_path, "plan", "corpus", "--recipe", recipe).stdout


@pytest.mark.parametrize(
    "command",
    [[], ["run"], ["plan"], ["stage"], ["chat"], ["export"], ["import"], ["serve"], ["up"], ["artifacts", "list"]],
)
def test_help_has_an_example(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "fathom " in result.output
