"""The Python distribution's own documentation and code (PSF-2.0), and docstrings of installed packages.

Nothing is bundled or downloaded: the texts are read from the running interpreter's library.
"""

from __future__ import annotations

import ast
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

from infra.errors import InputError
from stages.corpus.sources import Raw

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_CANDIDATE = re.compile(r'"""|\'\'\'')
MIN_DOCSTRING = 80
MIN_TEXT = 200


@dataclass(frozen=True)
class PythonDocs:
    """The language reference (pydoc's topics) and the standard library's docstrings."""

    name: str = "python_docs"
    language: str = "en"
    domain: str = "docs"
    license: str = "PSF-2.0"

    def versions(self) -> dict[str, str]:
        return {"python": platform.python_version()}

    def units(self) -> list[str]:
        return ["topics:", *(f"library:{path}" for path in _library_files())]

    def read(self, unit: str) -> list[Raw]:
        kind, _, path = unit.partition(":")
        if kind == "library":
            return _docstring_document(f"library/{path}", _library() / path)
        from pydoc_data.topics import topics

        return [Raw(f"topics/{name}", text.strip()) for name, text in sorted(topics.items()) if len(text) >= MIN_TEXT]


@dataclass(frozen=True)
class PythonCode:
    """The standard library's source without its tests."""

    name: str = "python_code"
    language: str = "code"
    domain: str = "code"
    license: str = "PSF-2.0"

    def versions(self) -> dict[str, str]:
        return {"python": platform.python_version()}

    def units(self) -> list[str]:
        return _library_files()

    def read(self, unit: str) -> list[Raw]:
        text = _read(_library() / unit)
        return [Raw(unit, text)] if len(text) >= MIN_TEXT else []


@dataclass(frozen=True)
class InstalledDocstrings:
    """Docstrings of installed packages, one document a module; each under its package's licence."""

    packages: tuple[str, ...]
    name: str = "installed_docstrings"
    language: str = "en"
    domain: str = "docs"
    license: str = field(default="see each document", init=False)

    def versions(self) -> dict[str, str]:
        found = {distribution.name: distribution.version for distribution in metadata.distributions()}
        return {package: found[package] for package in self.packages if package in found}  # units() names an absent one

    def units(self) -> list[str]:
        found = []
        for package in self.packages:
            try:
                files = metadata.files(package)
            except metadata.PackageNotFoundError:
                raise InputError(f"source.packages: {package!r} is not installed; install it or leave it out") from None
            found += [f"{package}:{file}" for file in files or () if _is_module(file.parts)]
        return sorted(found)

    def read(self, unit: str) -> list[Raw]:
        package, _, file = unit.partition(":")
        path = _root_of(package) / file
        return _docstring_document(file, path, _license_of(package)) if path.is_file() else []


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _library_files() -> list[str]:
    root = _library()
    if not root.is_dir():
        raise InputError(f"{sys.executable} has no library folder at {root}: use a full Python installation")
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path.as_posix() for path in files if _is_module(path.parts))


def _is_module(parts: tuple[str, ...]) -> bool:
    return parts[-1].endswith(".py") and not _SKIPPED & set(parts)


def _docstring_document(key: str, path: Path, license: str | None = None) -> list[Raw]:
    """All long docstrings of one file as one text, each under the name it documents. Files that do not parse: none."""
    code = _read(path)
    if not _CANDIDATE.search(code):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return []
    text = "\n\n".join(_docstrings(tree, ""))
    return [Raw(key, text, license=license)] if len(text) >= MIN_TEXT else []


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[str]:
    """The long docstrings of a definition and of those directly inside it, in the order of the file."""
    text = ast.get_docstring(node)
    if text and len(text) >= MIN_DOCSTRING:
        yield f"{name}\n{text}" if name else text
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(inner, inner.name)


def _read(path: Path) -> str:
    """The file's text, or nothing if it is not UTF-8 (a few library files test other encodings)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


@cache
def _root_of(package: str) -> Path:
    return Path(str(metadata.distribution(package).locate_file("")))


@cache
def _license_of(package: str) -> str:
    """The package's SPDX expression if it states one, else the first line of what it says."""
    about = metadata.metadata(package)
    classifiers = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    stated = about.get("License-Expression") or (classifiers[0] if classifiers else about.get("License")) or "unknown"
    return stated.strip().splitlines()[0][:80]
