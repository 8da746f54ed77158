"""The artifact store: a folder, or any fsspec URL, in which an artifact is either whole or absent.

Layout under the root: `artifacts/<stage>/<12 hex>/` with the files and `manifest.json`, `tags/<name>.json`, and the
work that is not yet an artifact: `drafts/`, `scratch/` (resume state, by artifact id), `locks/`, and `holds/`, which
keeps the inputs of running work from collection. On a file system the commit is one `rename` of a complete draft. On
an object store the files are uploaded under a unique prefix and the manifest, created only if absent, is the commit.
Either way the first writer wins and the loser adopts its result.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote, unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from infra.artifact import ID_PATTERN, MANIFEST, Artifact, Manifest, digest, recipe_id
from infra.config import nearest
from infra.errors import ArtifactNotFound, ConfigError, StoreError, TamperedArtifact
from infra.files import entry, move, sha256
from infra.holds import collecting, holding
from infra.lineage import ancestors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """One thing that `verify` found wrong with an artifact."""

    id: str
    path: str
    problem: str


class ArtifactStore:
    """Finds, commits, tags, verifies and collects artifacts under one root."""

    def __init__(self, url: str | Path, workspace: Path | None = None) -> None:
        """Open the store at `url` (created on first commit); drafts and scratch live in `workspace`."""
        try:
            self.fs, self.root = fsspec.core.url_to_fs(str(url), use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StoreError(f"store {url}: {error}; install the fsspec driver of that scheme") from None
        self.local = isinstance(self.fs, LocalFileSystem)
        self.work = Path(workspace or (self.root if self.local else ".fathom")).absolute()

    # ---- reading

    def ids(self) -> list[str]:
        """Ids of all committed artifacts, sorted."""
        found = self.fs.glob(f"{self.root}/artifacts/*/*/{MANIFEST}")
        return sorted("/".join(path.split("/")[-3:-1]) for path in found)

    def find(self, kind: str | None = None, stage: str | None = None, strict: bool = False) -> list[Manifest]:
        """Manifests, oldest first, of that kind and stage; unreadable ones are left out, or raised if `strict`."""
        manifests = []
        for artifact_id in self.ids():
            if stage is None or artifact_id.startswith(stage + "/"):
                try:
                    manifests.append(self.manifest(artifact_id))
                except ArtifactNotFound:
                    continue  # deleted since it was listed
                except TamperedArtifact:
                    if strict:
                        raise
        return sorted((m for m in manifests if kind in (None, m.kind)), key=lambda m: (m.created, m.id))

    def exists(self, artifact_id: str) -> bool:
        return bool(self.fs.exists(self._path(artifact_id, MANIFEST)))

    def manifest(self, artifact_id: str) -> Manifest:
        """The manifest of one artifact by its full id."""
        try:
            text = self.fs.cat_file(self._path(artifact_id, MANIFEST))
        except FileNotFoundError:
            raise ArtifactNotFound(f"no artifact {artifact_id} in {self.root}") from None
        try:
            return Manifest.model_validate_json(text)
        except ValidationError as error:
            raise TamperedArtifact(f"{artifact_id}: its manifest cannot be read ({error.errors()[0]['msg']})") from None

    def resolve(self, ref: str) -> str:
        """The id that a reference means: an id, a tag, or a prefix that only one artifact has."""
        if ID_PATTERN.fullmatch(ref) and self.exists(ref):
            return ref
        tags = self.tags()
        if ref in tags:
            return tags[ref]
        ids = self.ids()
        matches = [i for i in ids if len(ref) >= 3 and (i.startswith(ref) or i.partition("/")[2].startswith(ref))]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ArtifactNotFound(f"{ref!r} could be {', '.join(matches)}: give more of the id")
        raise ArtifactNotFound(f"no artifact or tag {ref!r} in {self.root}; {nearest(ref, [*tags, *ids])}")

    def get(self, ref: str) -> Artifact:
        """Open an artifact by id, tag or unique prefix; a remote one is copied to the workspace first."""
        manifest = self.manifest(self.resolve(ref))
        if self.local:
            return Artifact(manifest, Path(self._path(manifest.id)))
        return Artifact(manifest, self._download(manifest))

    def open(self, manifest: Manifest, path: str) -> BinaryIO:
        """One file of an artifact for reading, where it is and without a copy; ArtifactNotFound if it has none such."""
        if path not in {file.path for file in manifest.files}:
            raise ArtifactNotFound(f"{manifest.id} has no file {path!r}")
        parts = [manifest.payload, path] if manifest.payload else [path]
        return cast(BinaryIO, self.fs.open(self._path(manifest.id, *parts), "rb"))

    # ---- writing

    @contextlib.contextmanager
    def draft(self, artifact_id: str) -> Iterator[tuple[Path, Path]]:
        """Yield (draft, scratch) folders for one run of a recipe, alone on this machine; the draft goes away after.

        A second process that wants the same artifact waits here for the first.
        """
        name = artifact_id.replace("/", "-")
        draft = self.work / "drafts" / f"{name}-{uuid.uuid4().hex[:8]}"
        scratch = self.work / "scratch" / name
        lock = self.work / "locks" / name
        with contextlib.ExitStack() as stack:
            try:
                lock.parent.mkdir(parents=True, exist_ok=True)
                handle = stack.enter_context(lock.open("w"))
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log.warning("waiting for another process that makes %s", artifact_id)
                    fcntl.flock(handle, fcntl.LOCK_EX)
                for folder in (draft, scratch):  # after the lock: gc and the last holder remove what nobody holds
                    folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _store_error(error, f"preparing {artifact_id}") from None
            try:
                yield draft, scratch
            finally:
                shutil.rmtree(draft, ignore_errors=True)
                with contextlib.suppress(OSError):
                    scratch.rmdir()  # only if empty: resume state stays

    @contextlib.contextmanager
    def holding(self, ids: Iterable[str]) -> Iterator[None]:
        """Keep `gc` in this workspace from these artifacts and their ancestors, until the end or the process's."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(holding(self.work / "holds", ids))
            except OSError as error:  # who may only read can reuse, and makes nothing that needs holding
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise _store_error(error, "holding inputs") from None
            yield

    def commit(self, draft: Path, manifest: Manifest, replace: bool = False) -> Artifact:
        """Publish a draft's files as `manifest.id`, with their sizes and digests added to the manifest.

        Idempotent: if the artifact exists, that one is returned and the draft is left, unless `replace`.
        """
        if self.exists(manifest.id) and not replace:
            return self.get(manifest.id)
        try:
            files = tuple(entry(path, draft) for path in sorted(draft.rglob("*")) if path.is_file())
            manifest = manifest.model_copy(update={"files": files, "created": datetime.now(UTC)})
            if self.local:
                self._publish_folder(draft, manifest, replace)
            else:
                self._publish_objects(draft, manifest, replace)
        except OSError as error:
            raise _store_error(error, f"committing {manifest.id}") from None
        made = self.get(manifest.id)
        shutil.rmtree(self.work / "scratch" / manifest.id.replace("/", "-"), ignore_errors=True)
        return made

    def _publish_folder(self, draft: Path, manifest: Manifest, replace: bool) -> None:
        (draft / MANIFEST).write_text(manifest.sealed_json())
        target = Path(self._path(manifest.id))
        # Beside the target, which may be on another file system than the workspace; hidden from `ids` by its depth.
        new = Path(self.root, "incoming", f"{draft.name}.new")
        old = new.with_suffix(".old")
        try:
            for folder in (target.parent, new.parent):
                folder.mkdir(parents=True, exist_ok=True)
            move(draft, new)
            if target.exists() and (replace or not (target / MANIFEST).exists()):  # without: what a killed gc left
                target.rename(old)
            new.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            for folder in (new, old):
                shutil.rmtree(folder, ignore_errors=True)

    def _publish_objects(self, draft: Path, manifest: Manifest, replace: bool) -> None:
        manifest = manifest.model_copy(update={"payload": uuid.uuid4().hex[:8]})
        payload = self._path(manifest.id, manifest.payload)
        try:
            self.fs.makedirs(payload, exist_ok=True)
            for file in manifest.files:
                self.fs.makedirs(f"{payload}/{file.path}".rpartition("/")[0], exist_ok=True)
                self.fs.put_file(str(draft / file.path), f"{payload}/{file.path}")
            mode = "overwrite" if replace else "create"
            self.fs.pipe_file(self._path(manifest.id, MANIFEST), manifest.sealed_json().encode(), mode=mode)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.fs.rm(payload, recursive=True)
            if not isinstance(error, FileExistsError):
                raise

    # ---- tags

    def tags(self) -> dict[str, str]:
        """Tag name → artifact id."""
        paths = self.fs.glob(f"{self.root}/tags/*.json")
        tags: dict[str, str] = {}
        for path in paths:
            try:
                tags[unquote(path.rpartition("/")[2][:-5])] = str(json.loads(self.fs.cat_file(path))["id"])
            except FileNotFoundError:
                continue  # removed since it was listed
            except (ValueError, KeyError, TypeError) as error:
                raise TamperedArtifact(
                    f"the tag file {path} cannot be read ({error}); remove it and tag again"
                ) from None
        return tags

    def tag(self, name: str, ref: str) -> str:
        """Move a tag to an artifact (atomic); return the id."""
        if not name or ID_PATTERN.fullmatch(name) or name != name.strip():
            raise ConfigError(f"tag {name!r}: a tag is a name such as base@latest, and must not look like an id")
        artifact_id = self.resolve(ref)
        body = json.dumps({"id": artifact_id, "moved": datetime.now(UTC).isoformat()}).encode()
        path = f"{self.root}/tags/{quote(name, safe='@')}.json"
        try:
            self.fs.makedirs(f"{self.root}/tags", exist_ok=True)
            if self.local:
                new = Path(f"{path}.{uuid.uuid4().hex[:8]}")
                new.write_bytes(body)
                new.replace(path)
            else:
                self.fs.pipe_file(path, body)
        except OSError as error:
            raise _store_error(error, f"tagging {artifact_id}") from None
        return artifact_id

    def untag(self, name: str) -> None:
        """Remove a tag; the artifact stays."""
        path = f"{self.root}/tags/{quote(name, safe='@')}.json"
        if not self.fs.exists(path):  # not asked of `tags`, which an unreadable one ends
            raise ArtifactNotFound(f"no tag {name!r}; {nearest(name, self.tags())}")
        self.fs.rm(path)

    # ---- trust and space

    def verify(self, artifact_id: str) -> list[Fault]:
        """Compare every file with the manifest and the id with the recipe; an empty list means untouched."""
        try:
            manifest = self.manifest(artifact_id)
        except TamperedArtifact as error:
            return [Fault(artifact_id, MANIFEST, str(error))]
        faults = []
        record = json.loads(self.fs.cat_file(self._path(artifact_id, MANIFEST)))
        if record.pop("seal", "") != digest(record):
            faults.append(Fault(artifact_id, MANIFEST, "edited after the commit"))
        if _id_of(manifest) != artifact_id:
            faults.append(Fault(artifact_id, MANIFEST, "stage, config or inputs do not give this id"))
        base = self._path(artifact_id, *([manifest.payload] if manifest.payload else []))
        present = {path.removeprefix(base).lstrip("/"): info for path, info in self.fs.find(base, detail=True).items()}
        present.pop(MANIFEST, None)
        for file in manifest.files:
            info = present.pop(file.path, None)
            if info is None:
                faults.append(Fault(artifact_id, file.path, "missing"))
            elif info["size"] != file.bytes:
                faults.append(Fault(artifact_id, file.path, f"{info['size']} bytes, manifest says {file.bytes}"))
            else:
                with self.fs.open(f"{base}/{file.path}", "rb") as handle:
                    if sha256(handle) != file.sha256:
                        faults.append(Fault(artifact_id, file.path, "content differs from its SHA-256"))
        faults += [Fault(artifact_id, path, "not in the manifest") for path in sorted(present)]
        for role, parent in manifest.inputs.items():
            recorded = manifest.input_digests.get(role)
            try:
                changed = recorded and self.manifest(parent).content_digest != recorded
            except (ArtifactNotFound, TamperedArtifact):
                continue  # collected, or a fault of the parent's own
            if changed:
                faults.append(Fault(artifact_id, role, f"input {parent} was rebuilt since with a different content"))
        return faults

    def check(self, ref: str) -> Artifact:
        """`get`, but raise TamperedArtifact if `verify` finds a fault."""
        artifact_id = self.resolve(ref)
        faults = self.verify(artifact_id)
        if faults:
            listed = "; ".join(f"{fault.path}: {fault.problem}" for fault in faults[:5])
            raise TamperedArtifact(f"{artifact_id}: {listed}; rebuild it with --force or delete it")
        return self.get(artifact_id)

    def gc(self, dry_run: bool = False) -> list[Manifest]:
        """Delete artifacts that no tag reaches, and leftovers of killed runs; no ancestor of a tagged or held one."""
        with collecting(self.work / "holds") as held:
            manifests = {m.id: m for m in self.find(strict=True)}  # an unreadable one has ancestors that nobody knows
            kept = ancestors(manifests, [*self.tags().values(), *held])
            doomed = [m for i, m in manifests.items() if i not in kept]
            if not dry_run:
                for manifest in doomed:
                    self.fs.rm(self._path(manifest.id, MANIFEST))
                    self.fs.rm(self._path(manifest.id), recursive=True)
                    shutil.rmtree(self._cache / manifest.id, ignore_errors=True)
                self._sweep()
        return doomed

    def _sweep(self) -> None:
        """Remove drafts and scratch whose recipe no process is working on."""
        incoming = Path(self.root).glob("incoming/*") if self.local else ()
        for folder in [*self.work.glob("drafts/*"), *self.work.glob("scratch/*"), *incoming]:
            name = folder.name if folder.parent.name == "scratch" else folder.name.rpartition("-")[0]
            lock = self.work / "locks" / name
            lock.parent.mkdir(parents=True, exist_ok=True)
            with lock.open("w") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                shutil.rmtree(folder, ignore_errors=True)

    # ---- paths

    def _path(self, artifact_id: str, *parts: str) -> str:
        return "/".join([self.root, "artifacts", artifact_id, *parts])

    @cached_property
    def _cache(self) -> Path:
        return self.work / "cache"

    def _download(self, manifest: Manifest) -> Path:
        target = self._cache / manifest.id / manifest.payload
        if not target.exists():
            part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}")
            try:
                part.mkdir(parents=True, exist_ok=True)
                for file in manifest.files:
                    (part / file.path).parent.mkdir(parents=True, exist_ok=True)
                    self.fs.get_file(self._path(manifest.id, manifest.payload, file.path), str(part / file.path))
                with contextlib.suppress(FileExistsError):
                    part.rename(target)
            except OSError as error:
                if not target.exists():
                    raise _store_error(error, f"fetching {manifest.id}") from None
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return target


def _id_of(manifest: Manifest) -> str:
    return recipe_id(manifest.stage, manifest.stage_version, manifest.config, manifest.inputs, manifest.external)


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted path, left value, right value) for every leaf in which two nested mappings differ."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*left, *right}):
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b or (key in left) != (key in right):
            found.append((prefix + key, a, b))
    return found


def _store_error(error: OSError, doing: str) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(f"disk full while {doing}: nothing was committed; free space (fathom artifacts gc) and rerun")
    return StoreError(f"{doing}: {error}; nothing was committed")
