"""A stage run: roles, reuse, drift, kills, full disks, and the call by itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sample_stages
from sample_stages import (
    EmptyConfig,
    JoinConfig,
    StepsConfig,
    WordsConfig,
    full_disk,
    full_disk_in_worker,
    gather,
    join,
    read_outside,
    run_steps,
    steps,
    words,
)

from infra import provenance
from infra.artifact import Artifact
from infra.errors import ArtifactNotFound, ConfigError, InputError, StoreError, TamperedArtifact
from infra.metrics import METRICS, Progress, read_metrics
from infra.settings import Settings
from infra.stage import Context, run
from infra.store import ArtifactStore

ROOT = Path(__file__).parents[2]


# ---- the way through the store


def test_a_run_leaves_an_artifact_with_its_whole_provenance(store: ArtifactStore, tmp_path: Path) -> None:
    settings = Settings(workers=2, cost_per_hour=3600.0)
    result = run(words, WordsConfig(n=2, seed=7), {}, store, settings, labels={"pipeline": "corpus"})
    manifest = store.manifest(result.artifact.id)
    assert not result.reused
    assert manifest.id == words.id(WordsConfig(n=2, seed=7), {})
    assert (manifest.kind, manifest.config, manifest.summary) == (
        "documents", {"n": 2, "word": "word", "seed": 7}, {"n": 2}
    )  # fmt: skip
    made = manifest.provenance
    assert (made.seed, made.workers, made.labels) == (7, 2, {"pipeline": "corpus"})
    assert made.cost == pytest.approx(made.wall_seconds, abs=2e-3)
    assert made.source_digest == words.source_digest
    assert made.packages["torch"]
    assert made.device
    assert [f.path for f in manifest.files] == ["metrics.jsonl", "part/words.txt"]


def test_a_second_run_reuses_and_force_runs_again(store: ArtifactStore, settings: Settings) -> None:
    first = run(words, WordsConfig(), {}, store, settings)
    second = run(words, WordsConfig(), {}, store, settings)
    forced = run(words, WordsConfig(), {}, store, settings, force=True)
    assert (first.reused, second.reused, forced.reused) == (False, True, False)
    assert second.artifact.manifest == first.artifact.manifest
    assert forced.artifact.manifest.created > first.artifact.manifest.created
    assert forced.artifact.manifest.content_digest == first.artifact.manifest.content_digest
    assert store.verify(forced.artifact.id) == []


def test_a_tampered_artifact_is_not_reused_until_forced(store: ArtifactStore, settings: Settings) -> None:
    made = run(words, WordsConfig(), {}, store, settings).artifact
    (made.path / "part" / "words.txt").write_text("changed")
    with pytest.raises(TamperedArtifact, match="--force"):
        run(words, WordsConfig(), {}, store, settings)
    run(words, WordsConfig(), {}, store, settings, force=True)
    assert store.verify(made.id) == []


def test_a_tampered_input_stops_the_run(store: ArtifactStore, settings: Settings) -> None:
    made = run(words, WordsConfig(), {}, store, settings).artifact
    (made.path / "part" / "words.txt").write_text("changed")
    with pytest.raises(TamperedArtifact, match=r"part/words\.txt"):
        run(join, JoinConfig(), {"left": made.id}, store, settings)


def test_a_reused_artifact_says_that_the_code_has_changed(
    store: ArtifactStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(words, WordsConfig(), {}, store, settings)
    assert not run(words, WordsConfig(), {}, store, settings).drifted
    monkeypatch.setattr(provenance, "source_digest", lambda module: "another")
    assert run(words, WordsConfig(), {}, store, settings).drifted


def test_the_source_digest_changes_with_an_imported_module_of_ours(tmp_path: Path) -> None:
    """In a process of its own, with packages named as ours but in a folder of the test's."""
    for name, text in {
        "stages/__init__.py": "",
        "stages/work.py": "def f():\n    from model.part import g\n    return g()\n",
        "model/__init__.py": "",
        "model/part.py": "import kernels.op\n",
        "kernels/__init__.py": "",
        "kernels/op.py": "x = 1\n",
        "kernels/unused.py": "x = 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def digest() -> str:
        code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; "
        code += "from infra.provenance import source_digest as d; print(d('stages.work'))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout

    before = digest()
    (tmp_path / "kernels/unused.py").write_text("x = 2\n")
    assert digest() == before
    (tmp_path / "kernels/op.py").write_text("x = 2\n")
    assert digest() != before


def test_inputs_are_tags_ids_or_prefixes_and_the_manifest_keeps_ids(store: ArtifactStore, settings: Settings) -> None:
    left = run(words, WordsConfig(n=1), {}, store, settings).artifact.id
    store.tag("corpus@latest", left)
    made = run(join, JoinConfig(), {"left": "corpus@latest"}, store, settings).artifact
    assert made.manifest.inputs == {"left": left}
    assert made.id == join.id(JoinConfig(), {"left": left})
    assert made.manifest.input_digests == {"left": store.manifest(left).content_digest}


def test_optional_and_many_roles_reach_the_function_in_the_order_of_their_names(
    store: ArtifactStore, settings: Settings
) -> None:
    left = run(words, WordsConfig(n=1, word="a"), {}, store, settings).artifact.id
    right = run(words, WordsConfig(n=1, word="b"), {}, store, settings).artifact.id
    one = run(join, JoinConfig(), {"left": left}, store, settings).artifact
    two = run(join, JoinConfig(separator="+"), {"left": left, "right": right}, store, settings).artifact
    both = run(gather, JoinConfig(), {"parts.two": two.id, "parts.one": one.id}, store, settings).artifact
    assert (one.summary["sides"], two.summary["sides"]) == (1, 2)
    assert (both.path / "all.txt").read_text() == "a 0|a 0+b 0"


@pytest.mark.parametrize(
    ("stage", "refs", "message"),
    [
        (join, {}, r"join needs input left \(documents\)"),
        (join, {"left": "d", "rihgt": "d"}, "takes no input 'rihgt'; did you mean 'right'"),
        (join, {"left.x": "d"}, "it takes one artifact"),
        (gather, {"parts": "d"}, r"give it as parts\.NAME"),
        (gather, {}, r"gather needs input parts \(tokens\)"),
        (gather, {"parts.a": "d"}, "input parts.a is words/[0-9a-f]{12}, a documents; it takes a tokens"),
    ],
)
def test_wrong_inputs_are_named(
    stage: sample_stages.Any, refs: dict[str, str], message: str, store: ArtifactStore, settings: Settings
) -> None:
    store.tag("d", run(words, WordsConfig(), {}, store, settings).artifact.id)
    with pytest.raises(ConfigError, match=message):
        run(stage, JoinConfig(), refs, store, settings)


def test_an_input_that_does_not_exist_is_not_found(store: ArtifactStore, settings: Settings) -> None:
    with pytest.raises(ArtifactNotFound):
        run(join, JoinConfig(), {"left": "words/0123456789ab"}, store, settings)


def test_progress_has_counts_rate_and_time_left(store: ArtifactStore, settings: Settings) -> None:
    seen: list[Progress] = []
    run(words, WordsConfig(n=3), {}, store, settings, on_progress=seen.append)
    assert [(p.done, p.total, p.unit) for p in seen] == [(1, 3, "words"), (2, 3, "words"), (3, 3, "words")]
    assert seen[1].rate > 0
    assert seen[1].eta_seconds == pytest.approx(1 / seen[1].rate)
    assert str(seen[2]).startswith("3/3 words (100 %")


# ---- by itself


def test_a_stage_is_callable_by_itself_on_folders(tmp_path: Path) -> None:
    (tmp_path / "mine" / "part").mkdir(parents=True)
    (tmp_path / "mine" / "part" / "words.txt").write_text("x\ny\n")
    ctx = Context.local(tmp_path / "run")
    summary = join(JoinConfig(separator="-"), {"left": Artifact.local(tmp_path / "mine", kind="documents")}, ctx)
    assert summary == {"sides": 1, "lines": 2}
    assert (ctx.out / "line.txt").read_text() == "x-y"


# ---- what goes wrong


def test_what_changes_while_it_is_read_is_not_committed(
    store: ArtifactStore, settings: Settings, tmp_path: Path
) -> None:
    config = sample_stages.OutsideConfig(path=str(tmp_path / "mine.txt"))
    Path(config.path).write_text("before")
    with pytest.raises(InputError, match="changed while it ran; nothing was committed"):
        run(read_outside, config, {}, store, settings)
    assert store.ids() == []
    assert list((store.work / "scratch").iterdir()) == []
    made = run(read_outside, config, {}, store, settings).artifact
    assert made.manifest.external == {"file": "before, and more"}
    assert store.verify(made.id) == []


def test_gc_leaves_the_inputs_of_a_run_alone(
    store: ArtifactStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = run(words, WordsConfig(n=1), {}, store, settings).artifact.id
    lost = run(words, WordsConfig(n=2), {}, store, settings).artifact.id
    collected: list[str] = []

    def collect(progress: Progress) -> None:
        collected.extend(m.id for m in store.gc())

    one = run(join, JoinConfig(), {"left": left}, store, settings).artifact.id
    with store.holding([one]):
        assert [m.id for m in store.gc()] == [lost]
    run(words, WordsConfig(n=1), {}, store, settings, force=True, on_progress=collect)
    assert collected == [one]
    assert [m.id for m in store.gc()] == [left]


def test_a_stage_that_raises_leaves_no_artifact_and_no_draft(store: ArtifactStore, settings: Settings) -> None:
    made = run(words, WordsConfig(), {}, store, settings).artifact
    with pytest.raises(AttributeError):
        run(join, JoinConfig.model_construct(separator=None), {"left": made.id}, store, settings)
    assert store.ids() == [made.id]
    assert list((store.work / "drafts").iterdir()) == []


def test_a_killed_stage_leaves_no_artifact_and_its_scratch_and_resumes(
    store: ArtifactStore, settings: Settings
) -> None:
    config = StepsConfig(steps=10, hang_at=6)
    scratch = store.work / "scratch" / steps.id(config, {}).replace("/", "-")
    process = multiprocessing.get_context("spawn").Process(target=run_steps, args=(store.root, 6))
    process.start()
    deadline = time.monotonic() + 60
    while not (scratch / "step").exists() or (scratch / "step").read_text() != "6":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert store.ids() == []
    assert (scratch / "step").read_text() == "6"
    with (scratch / METRICS).open("a") as log:
        log.write('{"step": 7, "lo')  # what a kill in the middle of a write leaves
    made = run(steps, config, {}, store, settings).artifact
    assert made.summary == {"resumed_at": 6}
    assert [row["step"] for row in read_metrics(made.path / METRICS)] == list(range(1, 11))
    assert sorted(p.name for p in made.path.glob("*.txt")) == sorted(f"{n}.txt" for n in range(7, 11))
    assert not scratch.exists()
    store.gc(dry_run=False)
    assert list((store.work / "drafts").iterdir()) == []


def test_two_processes_that_run_one_recipe_run_it_once(store: ArtifactStore) -> None:
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=run_steps, args=(store.root, -1)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(store.ids()) == 1
    assert store.verify(store.ids()[0]) == []
    assert list((store.work / "scratch").iterdir()) == []


@pytest.mark.parametrize("stage", [full_disk, full_disk_in_worker], ids=["here", "in a Ray worker"])
def test_no_space_left_is_a_store_error_and_the_store_is_as_it_was(
    stage: sample_stages.Any,
    store: ArtifactStore,
    settings: Settings,
    tree: Callable[[Path], dict[str, bytes]],
    ray_session: None,
) -> None:
    run(words, WordsConfig(), {}, store, settings)
    before = tree(Path(store.root) / "artifacts")
    with pytest.raises(StoreError, match="disk full"):
        run(stage, EmptyConfig(), {}, store, settings)
    assert tree(Path(store.root) / "artifacts") == before
    assert list((store.work / "drafts").iterdir()) == []
