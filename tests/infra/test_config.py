"""Configs, settings and the metrics log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.config import Config, Field
from infra.errors import ConfigError
from infra.metrics import METRICS, MetricsLog, Progress, read_metrics
from infra.settings import Settings


class OptimizerConfig(Config):
    learning_rate: float = Field(0.1, gt=0)


class TrainConfig(Config):
    steps: int = 10
    optimizer: OptimizerConfig = OptimizerConfig()


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"TrainConfig: no field 'step'; did you mean 'steps'\?"):
        TrainConfig.parse({"step": 3})


def test_an_unknown_nested_key_names_its_path_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'optimizer\.learning_rat'; did you mean 'learning_rate'\?"):
        TrainConfig.parse({"optimizer": {"learning_rat": 3}})


def test_a_name_like_no_other_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="choose from optimizer, steps"):
        TrainConfig.parse({"zzz": 3})


def test_every_problem_is_told_at_once_with_what_was_given() -> None:
    with pytest.raises(ConfigError) as told:
        TrainConfig.parse({"steps": "many", "optimizer": {"learning_rate": -1}})
    lines = str(told.value).splitlines()
    assert lines[0].startswith("TrainConfig.steps: ")
    assert "(got 'many')" in lines[0]
    assert lines[1].startswith("TrainConfig.optimizer.learning_rate: Input should be greater than 0 (got -1")


def test_a_config_is_frozen_and_replaced_with_validation() -> None:
    config = TrainConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[misc]
    assert config.replace(steps=3).steps == 3
    with pytest.raises(ConfigError):
        config.replace(stepps=3)


# ---- settings


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("content", [b"workers = ", b"\xff"])
def test_a_file_that_is_not_toml_is_a_config_error(folder: Path, content: bytes) -> None:
    (folder / "fathom.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"fathom\.toml: "):
        Settings.load()


def test_a_variable_wins_over_the_file_and_the_file_over_the_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "fathom.toml").write_text('store = "file-store"\nworkers = 3\n')
    monkeypatch.setenv("FATHOM_WORKERS", "5")
    settings = Settings.load()
    assert (settings.store, settings.workers, settings.prefect_port) == ("file-store", 5, 4200)
    assert Settings.load(workers=7).workers == 7


def test_an_unknown_setting_in_the_file_names_the_nearest(folder: Path) -> None:
    (folder / "fathom.toml").write_text("worker = 3\n")
    with pytest.raises(ConfigError, match="no field 'worker'; did you mean 'workers'"):
        Settings.load()


def test_a_misspelt_variable_is_refused_and_a_stranger_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_EXPLORER_SERVICE_HOST", "10.0.0.1")  # Kubernetes sets such names by itself
    Settings.load()
    monkeypatch.setenv("FATHOM_WORKER", "3")
    with pytest.raises(ConfigError, match="FATHOM_WORKER; did you mean FATHOM_WORKERS"):
        Settings.load()


def test_a_setting_out_of_range_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_WORKERS", "0")
    with pytest.raises(ConfigError, match=r"workers: .*greater than or equal to 1"):
        Settings.load()


# ---- metrics


def test_a_resumed_log_drops_the_rows_that_are_done_again(tmp_path: Path) -> None:
    first = MetricsLog(tmp_path / METRICS)
    for step in range(1, 7):
        first.report(step, 10, "steps", loss=float(step))
    second = MetricsLog(tmp_path / METRICS)
    for step in range(5, 9):
        second.report(step, 10, "steps", loss=-float(step))
    rows = read_metrics(tmp_path / METRICS)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["loss"] for row in rows] == [1, 2, 3, 4, -5, -6, -7, -8]


def test_a_truncated_last_line_is_left_out_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1]
    MetricsLog(path).report(2, 3, "steps", loss=1.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_report_without_metrics_writes_no_row(tmp_path: Path) -> None:
    MetricsLog(tmp_path / METRICS).report(1, 2, "shards")
    assert read_metrics(tmp_path / METRICS) == []


def test_the_rate_is_of_what_is_counted_now(tmp_path: Path) -> None:
    seen: list[Progress] = []
    log = MetricsLog(tmp_path / METRICS, seen.append)
    for done, total, unit in [(40, 48, "problems"), (48, 48, "problems"), (1, 3, "languages"), (2, 3, "languages")]:
        log.report(done, total, unit)
    for done in (1, 2, 1, 2):  # over the same shards twice
        log.report(done, 2, "shards")
    assert all(progress.rate >= 0 for progress in seen)
    assert [progress.eta_seconds is None for progress in seen] == [True, False] * 4
