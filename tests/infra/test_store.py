"""The store: identity, commit, tags, verify, collection, on a folder and on object stores."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_stages import BytesConfig, blob, commit, race

from infra.artifact import MANIFEST, recipe_id
from infra.errors import ArtifactNotFound, ConfigError, StoreError, TamperedArtifact
from infra.lineage import lineage
from infra.settings import Settings
from infra.stage import run
from infra.store import ArtifactStore, differences

Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture(params=["folder", "dir", "memory"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """A folder; an object store that other processes see; an object store in memory."""
    url = {"folder": f"{tmp_path}/s", "dir": f"dir::file://{tmp_path}/s", "memory": f"memory://{uuid.uuid4().hex}/s"}
    return ArtifactStore(url[request.param], tmp_path / "work")


# ---- identity


def test_an_id_is_the_hash_of_stage_version_config_and_inputs() -> None:
    first = recipe_id("pretrain", 1, {"lr": 0.1, "seed": 0}, {"tokens": "tokenize/0123456789ab"})
    assert first == recipe_id("pretrain", 1, {"seed": 0, "lr": 0.1}, {"tokens": "tokenize/0123456789ab"})
    others = [
        recipe_id("sft", 1, {"lr": 0.1, "seed": 0}, {"tokens": "tokenize/0123456789ab"}),
        recipe_id("pretrain", 2, {"lr": 0.1, "seed": 0}, {"tokens": "tokenize/0123456789ab"}),
        recipe_id("pretrain", 1, {"lr": 0.1, "seed": 1}, {"tokens": "tokenize/0123456789ab"}),
        recipe_id("pretrain", 1, {"lr": 0.1, "seed": 0}, {"tokens": "tokenize/0123456789ac"}),
    ]
    assert len({first, *others}) == 5


def test_an_id_is_the_same_in_every_release() -> None:
    """Anybody's store would lose its reuse if this changed."""
    canonical = '["words",1,{"n":3,"text":"中文"},{}]'
    expected = "words/" + hashlib.sha256(canonical.encode()).hexdigest()[:12]
    assert recipe_id("words", 1, {"text": "中文", "n": 3}, {}) == expected == "words/9ede38f73a74"


# ---- commit


def test_a_commit_holds_every_file_and_verifies(any_store: ArtifactStore, tmp_path: Path) -> None:
    made = commit(any_store, tmp_path / "draft", files={"a.txt": "one", "deep/er/b.txt": "two"})
    assert (made.path / "deep/er/b.txt").read_text() == "two"
    assert [(f.path, f.bytes) for f in made.manifest.files] == [("a.txt", 3), ("deep/er/b.txt", 3)]
    assert any_store.verify(made.id) == []
    assert any_store.ids() == [made.id]


def test_one_file_is_read_where_it_is_and_only_if_the_manifest_names_it(
    any_store: ArtifactStore, tmp_path: Path
) -> None:
    made = commit(any_store, tmp_path / "draft", files={"deep/a.txt": "one"}).manifest
    with any_store.open(made, "deep/a.txt") as handle:
        assert handle.read() == b"one"
    for path in ("b.txt", "../x", MANIFEST):
        with pytest.raises(ArtifactNotFound, match="has no file"):
            any_store.open(made, path)


def test_a_second_commit_of_an_id_adopts_the_first(any_store: ArtifactStore, tmp_path: Path) -> None:
    first = commit(any_store, tmp_path / "one", files={"a.txt": "first"})
    second = commit(any_store, tmp_path / "two", files={"a.txt": "second"})
    assert second.manifest == first.manifest
    assert (second.path / "a.txt").read_text() == "first"


def test_a_replacing_commit_takes_the_place_of_the_first(any_store: ArtifactStore, tmp_path: Path) -> None:
    commit(any_store, tmp_path / "one", files={"a.txt": "first", "gone.txt": "x"})
    made = commit(any_store, tmp_path / "two", files={"a.txt": "second"}, replace=True)
    assert sorted(p.name for p in made.path.iterdir() if p.name != MANIFEST) == ["a.txt"]
    assert (made.path / "a.txt").read_text() == "second"
    assert any_store.verify(made.id) == []


def test_of_two_processes_that_commit_one_id_the_first_wins_and_both_hold_its_files(tmp_path: Path) -> None:
    # On a folder alone: an object store creates the manifest whole, the folder that stands in for one here does not.
    spawn, rounds = multiprocessing.get_context("spawn"), 12
    barrier, results = spawn.Barrier(2), spawn.Queue()
    url = f"{tmp_path}/store"
    writers = [
        spawn.Process(target=race, args=(url, f"{tmp_path}/work{w}", w, rounds, barrier, results)) for w in range(2)
    ]
    for writer in writers:
        writer.start()
    seen = [results.get(timeout=60) for _ in range(2 * rounds)]
    for writer in writers:
        writer.join()
    for i in range(rounds):
        (digest_a, texts_a), (digest_b, texts_b) = [(d, texts) for j, d, texts in seen if j == i]
        assert digest_a == digest_b
        assert texts_a == texts_b
        assert len(set(texts_a)) == 1, "files of two writers in one artifact"
    store = ArtifactStore(url, tmp_path / "reader")
    assert len(store.ids()) == rounds
    assert [fault for i in store.ids() for fault in store.verify(i)] == []


def test_a_workspace_on_another_file_system_commits_too(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    with tempfile.TemporaryDirectory(dir=shm) as work:
        store = ArtifactStore(tmp_path / "store", Path(work))
        made = run(blob, BytesConfig(n=10), {}, store, Settings())
    assert store.verify(made.artifact.id) == []


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("workspace", ["on the small disk", "elsewhere"])
def test_a_full_disk_is_a_store_error_and_leaves_the_store_as_it_was(
    workspace: str, small_disk: Path, tmp_path: Path, tree: Tree
) -> None:
    elsewhere = tmp_path / "work" if workspace == "elsewhere" else None
    store = ArtifactStore(small_disk / "store", elsewhere)
    kept = run(blob, BytesConfig(n=1000), {}, store, Settings()).artifact
    before = tree(small_disk / "store" / "artifacts")
    with pytest.raises(StoreError, match="disk full"):
        run(blob, BytesConfig(n=1 << 20), {}, store, Settings())
    assert tree(small_disk / "store" / "artifacts") == before
    assert not any((small_disk / "store").glob("*/*.new"))
    assert store.verify(kept.id) == []
    assert run(blob, BytesConfig(n=2000), {}, store, Settings()).artifact.manifest.bytes == 2000


def test_a_root_that_is_a_file_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="nothing was committed"):
        run(blob, BytesConfig(n=1), {}, ArtifactStore(tmp_path / "file"), Settings())


def test_an_unknown_scheme_is_a_store_error() -> None:
    with pytest.raises(StoreError, match="install the fsspec driver"):
        ArtifactStore("nosuchscheme://bucket/x")


# ---- names


def test_a_reference_is_an_id_a_tag_or_a_unique_prefix(any_store: ArtifactStore, tmp_path: Path) -> None:
    one = commit(any_store, tmp_path / "1", "words", {"n": 1}).id
    two = commit(any_store, tmp_path / "2", "words", {"n": 2}).id
    any_store.tag("corpus/en@latest", one)
    assert any_store.tags() == {"corpus/en@latest": one}
    assert any_store.resolve("corpus/en@latest") == one
    assert any_store.resolve(two) == any_store.resolve(two[:10]) == any_store.resolve(two.split("/")[1][:6]) == two
    with pytest.raises(ArtifactNotFound, match="could be"):
        any_store.resolve("words/")
    with pytest.raises(ArtifactNotFound, match="did you mean 'corpus/en@latest'"):
        any_store.resolve("corpus/en@lastest")


def test_a_tag_moves_and_is_removed_without_its_artifact(any_store: ArtifactStore, tmp_path: Path) -> None:
    one, two = (commit(any_store, tmp_path / str(n), "words", {"n": n}).id for n in (1, 2))
    any_store.tag("base@latest", one)
    any_store.tag("base@latest", two)
    assert any_store.tags() == {"base@latest": two}
    any_store.untag("base@latest")
    assert any_store.tags() == {}
    assert any_store.ids() == sorted([one, two])
    with pytest.raises(ArtifactNotFound, match="no tag"):
        any_store.untag("base@latest")


@pytest.mark.parametrize("name", ["", " x", "words/0123456789ab"])
def test_a_tag_cannot_be_empty_or_look_like_an_id(name: str, store: ArtifactStore, tmp_path: Path) -> None:
    made = commit(store, tmp_path / "d").id
    with pytest.raises(ConfigError, match="tag"):
        store.tag(name, made)


# ---- trust


def _change(path: Path) -> None:
    path.write_text(path.read_text()[::-1])


def _edit_manifest(field: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(record | {field: value}))

    return edit


@pytest.mark.parametrize(
    ("tamper", "path", "problem"),
    [
        (lambda folder: _change(folder / "a.txt"), "a.txt", "SHA-256"),
        (lambda folder: (folder / "a.txt").unlink(), "a.txt", "missing"),
        (lambda folder: (folder / "b.txt").write_text("x"), "b.txt", "not in the manifest"),
        (lambda folder: (folder / "a.txt").write_text("longer than it was"), "a.txt", "18 bytes, manifest says 4"),
        (_edit_manifest("config", {"n": 7}), MANIFEST, "do not give this id"),
        (_edit_manifest("summary", {"accuracy": 1.0}), MANIFEST, "edited after the commit"),
        (lambda folder: (folder / MANIFEST).write_text("{"), MANIFEST, "cannot be read"),
    ],
)
def test_verify_names_what_was_tampered_with(
    tamper: Callable[[Path], None], path: str, problem: str, store: ArtifactStore, tmp_path: Path
) -> None:
    made = commit(store, tmp_path / "d", files={"a.txt": "text"})
    tamper(made.path)
    faults = store.verify(made.id)
    assert any(fault.path == path and problem in fault.problem for fault in faults), faults
    with pytest.raises(TamperedArtifact):
        store.check(made.id)


def test_an_input_rebuilt_with_other_content_is_reported(any_store: ArtifactStore, tmp_path: Path) -> None:
    parent = commit(any_store, tmp_path / "1", "words", files={"a.txt": "one"}).id
    child = commit(any_store, tmp_path / "2", "join", inputs={"left": parent}).id
    commit(any_store, tmp_path / "3", "words", files={"a.txt": "one"}, replace=True)
    assert any_store.verify(child) == []
    commit(any_store, tmp_path / "4", "words", files={"a.txt": "two"}, replace=True)
    assert ["rebuilt since" in fault.problem for fault in any_store.verify(child)] == [True]


def test_differences_names_every_leaf() -> None:
    left = {"lr": 0.1, "model": {"layers": 2, "heads": 4}, "only": None}
    right = {"lr": 0.1, "model": {"layers": 3, "heads": 4}}
    assert differences(left, right) == [("model.layers", 2, 3), ("only", None, None)]


def test_a_folder_that_a_killed_gc_left_does_not_block_its_id(store: ArtifactStore, tmp_path: Path) -> None:
    made = commit(store, tmp_path / "1", files={"a.txt": "text", "b.txt": "text"})
    (made.path / MANIFEST).unlink()
    (made.path / "b.txt").unlink()
    again = commit(store, tmp_path / "2", files={"a.txt": "text", "b.txt": "text"})
    assert store.verify(again.id) == []


def test_one_unreadable_manifest_spoils_neither_the_listing_nor_its_children(
    store: ArtifactStore, tmp_path: Path
) -> None:
    parent = commit(store, tmp_path / "1", "words")
    child = commit(store, tmp_path / "2", "join", inputs={"left": parent.id}).id
    (parent.path / MANIFEST).write_text("{")
    assert [m.id for m in store.find()] == [child]
    assert store.verify(child) == []
    assert list(lineage(store, child).nodes) == [parent.id, child]
    with pytest.raises(TamperedArtifact, match=parent.id):
        store.gc()
    assert store.ids() == sorted([parent.id, child])


def test_an_unreadable_tag_is_named_and_can_be_removed(store: ArtifactStore, tmp_path: Path) -> None:
    store.tag("base@latest", commit(store, tmp_path / "1").id)
    (Path(store.root) / "tags" / "base@latest.json").write_text("{")
    with pytest.raises(TamperedArtifact, match=r"tags/base@latest\.json cannot be read"):
        store.tags()
    store.untag("base@latest")
    assert store.tags() == {}


# ---- collection


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_gc_takes_all_but_the_ancestors_of_tags(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = ArtifactStore(Path(folder) / "store")
        ids: list[str] = []
        parents: dict[str, list[str]] = {}
        for n in range(data.draw(st.integers(1, 9))):
            chosen = data.draw(st.lists(st.sampled_from(ids), unique=True, max_size=3)) if ids else []
            made = commit(
                store, Path(folder) / str(n), config={"n": n}, inputs={f"r{k}": i for k, i in enumerate(chosen)}
            )
            ids.append(made.id)
            parents[made.id] = chosen
        tagged = data.draw(st.sets(st.sampled_from(ids)))
        for n, artifact_id in enumerate(sorted(tagged)):
            store.tag(f"t{n}", artifact_id)
        kept: set[str] = set()
        while tagged - kept:
            kept |= tagged
            tagged = {p for i in tagged for p in parents[i]}
        doomed = {m.id for m in store.gc(dry_run=True)}
        assert store.ids() == sorted(ids)
        assert doomed == {m.id for m in store.gc()} == set(ids) - kept
        assert set(store.ids()) == kept
        assert [fault for i in kept for fault in store.verify(i)] == []


def test_gc_sweeps_leftovers_but_not_what_a_run_holds(store: ArtifactStore) -> None:
    old = store.work / "scratch" / "steps-000000000000"
    old.mkdir(parents=True)
    with store.draft("steps/111111111111") as (draft, scratch):
        (scratch / "state").write_text("5")
        store.gc()
        assert draft.exists()
        assert scratch.exists()
    assert not old.exists()
    store.gc()
    assert not scratch.exists()


def test_gc_empties_an_object_store_of_what_no_tag_reaches(any_store: ArtifactStore, tmp_path: Path) -> None:
    kept = commit(any_store, tmp_path / "1", "words", {"n": 1}).id
    any_store.tag("keep", commit(any_store, tmp_path / "2", "join", inputs={"left": kept}).id)
    lost = commit(any_store, tmp_path / "3", "words", {"n": 2}).id
    assert [m.id for m in any_store.gc()] == [lost]
    assert not any_store.fs.find(f"{any_store.root}/artifacts/{lost}")
    with pytest.raises(ArtifactNotFound):
        any_store.get(lost)


def test_gc_keeps_what_is_held_until_the_holder_ends_or_is_killed(any_store: ArtifactStore, tmp_path: Path) -> None:
    parent = commit(any_store, tmp_path / "1", "words").id
    child = commit(any_store, tmp_path / "2", "join", inputs={"left": parent}).id
    with any_store.holding([child]):
        assert any_store.gc() == []
    (any_store.work / "holds" / "killed.json").write_text(json.dumps([child]))
    cached = any_store.work / "cache" / parent
    assert cached.exists() != any_store.local
    assert {m.id for m in any_store.gc()} == {parent, child}
    assert not list((any_store.work / "holds").glob("*.json"))
    assert not cached.exists()


def test_a_draft_says_that_it_waits_for_another(store: ArtifactStore, caplog: pytest.LogCaptureFixture) -> None:
    def wait() -> None:
        with store.draft("steps/111111111111"):
            pass

    with store.draft("steps/111111111111"):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(10)
    assert caplog.messages == ["waiting for another process that makes steps/111111111111"]
