"""The house itself: whose packages are imported, how long files are, and that the README tells the truth."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
import typer

import stages
from infra.settings import Settings
from infra.stage import Role

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "model", "stages", "infra", "flows", "dashboards")
README = (ROOT / "README.md").read_text()
TRACKED = [
    ROOT / name
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
] or [path for name in (*PACKAGES, "tests") for path in (ROOT / name).rglob("*.py")]
MODULES = [path for path in TRACKED if path.suffix == ".py" and path.exists()]


@pytest.mark.parametrize("name", PACKAGES)
def test_the_package_imported_is_ours_and_not_one_of_the_registry(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__
    assert Path(module.__file__) == ROOT / name / "__init__.py"


def test_the_wheel_holds_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == sorted(PACKAGES)


def test_every_folder_of_a_package_is_a_package() -> None:
    folders = {path.parent for path in MODULES if path.relative_to(ROOT).parts[0] in PACKAGES}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_every_module_of_ours_says_what_to_know_first() -> None:
    ours = [path for path in MODULES if path.relative_to(ROOT).parts[0] in PACKAGES]
    assert [path for path in ours if not path.read_text().lstrip("#!\n").removeprefix("r").startswith('"""')] == []


def test_no_tracked_file_names_a_machines_path_or_a_registry() -> None:
    machine = r"(?<![\w./<>$})-])/(?:home|mnt|opt|root|srv|Users|work)/[a-zA-Z]"
    registry = r"\b(?:pypi|files\.pythonhosted|download\.pytorch|registry|ghcr|quay)\.(?:org|io|com)\b"
    told = re.compile(f"{machine}|{registry}")
    texts = [path for path in TRACKED if path.exists() and path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ""}]
    deploy = ROOT / "infra" / "deploy"  # container files have paths of the container's own
    found = [
        f"{path.relative_to(ROOT)}:{n}: {line.strip()}"
        for path in texts
        if deploy not in path.parents and path.is_file()
        for n, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if told.search(line)
    ]
    assert found == []


def test_the_locks_pin_every_line_and_name_no_index() -> None:
    for name in ("cpu", "gpu"):
        lines = (ROOT / "requirements" / f"lock-{name}.txt").read_text().splitlines()
        assert [line for line in lines if not re.fullmatch(r"[\w.-]+(\[[a-z,-]+\])?==[\w.!]+", line)] == []
    gpu = (ROOT / "requirements" / "lock-gpu.txt").read_text()
    assert "nvidia-nccl" in gpu, "the GPU lock was compiled against a CPU build of torch: see make lock"


# ---- the README


def commands() -> list[str]:
    """Lines of the README's shell blocks, comments cut."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.DOTALL)
    return [line.split(" #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_readme_has_the_two_commands() -> None:
    assert {"make run", "make test"} <= set(commands())


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("make ")])
def test_every_make_target_of_the_readme_exists(line: str) -> None:
    words = [word for word in line.split()[1:] if "=" not in word]
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [c for c in commands() if c.removeprefix(".venv/bin/").startswith("fathom ")])
def test_every_fathom_command_of_the_readme_is_parsed(line: str) -> None:
    """The real parser takes each one, options and all; nothing is run."""
    from flows.cli import app

    command: click.Command = typer.main.get_command(app)
    words = shlex.split(line.removeprefix(".venv/bin/"))[1:]
    context = click.Context(command, info_name="fathom")
    while hasattr(command, "resolve_command") and words and not words[0].startswith("-"):
        name, found, words = command.resolve_command(context, words)
        assert found is not None, name
        command, context = found, click.Context(found, parent=context, info_name=name)
    command.make_context("fathom", list(words), parent=context.parent)


def test_the_readme_lists_every_setting_with_its_default() -> None:
    for name, field in Settings.model_fields.items():
        assert f"`FATHOM_{name.upper()}`" in README
        if isinstance(field.default, str) or name.endswith(("port", "_mb")):
            assert re.search(rf"`FATHOM_{name.upper()}` \| `{re.escape(str(field.default))}`", README), name


@pytest.mark.parametrize("name", stages.NAMES)
def test_the_readme_tells_what_every_stage_takes_and_makes(name: str) -> None:
    stage = stages.load(name)

    kinds = [taken.kind for taken in stage.takes.values()]

    def written(role: str, taken: Role) -> str:
        name = f"{role}: {taken.kind}" if kinds.count(taken.kind) > 1 else taken.kind
        return f"{name}{' (many)' if taken.many else ''}{' (optional)' if taken.optional else ''}"

    takes = ", ".join(written(role, taken) for role, taken in stage.takes.items()) or "—"
    assert f"| `{name}` | {takes} | {stage.makes} |" in README
