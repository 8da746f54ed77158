"""Recipes: the values of a whole line's configs, node by node, and what `--set` changes in them.

A recipe holds plain values; a stage's config type checks them when the recipe is resolved for a pipeline, before
anything runs. A node without values takes its stage's defaults.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel

import stages
from flows.pipelines import Load, Pipeline
from infra.config import Config, nearest
from infra.errors import ConfigError

Values = Mapping[str, Any]
LINES = ("tiny", "h100", "v1_67b", "moe_2b", "moe_16b", "v2_lite", "v2", "v3")  # for every pipeline of the line
REPRODUCTIONS = ("logic_rl", "tiny_zero", "open_r1")  # each for one pipeline from a published checkpoint
RECIPES = (*LINES, *REPRODUCTIONS)


@dataclass(frozen=True)
class Recipe:
    """Config values by node, and upstream results that are taken from the store by id or tag instead of being made."""

    name: str
    doc: str
    configs: Mapping[str, Values]
    pins: Mapping[str, str] = field(default_factory=dict)
    pipeline: str | None = None  # the only one that it is for

    def resolve(self, pipeline: Pipeline, settings: Iterable[str] = (), load: Load = stages.load) -> dict[str, Config]:
        """The checked config of every node, with `node.field=value` settings applied in order."""
        if self.pipeline not in (None, pipeline.name):
            raise ConfigError(f"recipe {self.name} is for the pipeline {self.pipeline}, not for {pipeline.name}")
        types = {node.name: load(node.stage).config_type for node in pipeline.nodes}
        changes: dict[str, list[tuple[list[str], Any]]] = {name: [] for name in types}
        for setting in settings:
            path, value = parse_setting(setting)
            for name in _targets(pipeline, path[0]):
                changes[name].append((path[1:], value))
        return {
            name: _resolved(kind, self.configs.get(name, {}), changes[name], f"recipe {self.name}, {name}", name)
            for name, kind in types.items()
        }


def load_recipe(name: str) -> Recipe:
    """The recipe of that name; ConfigError names the nearest right one."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; {nearest(name, RECIPES)}")
    module = "reproductions" if name in REPRODUCTIONS else "published" if name.startswith(("v", "moe")) else name
    return importlib.import_module(f"flows.recipes.{module}").recipe(name)


def parse_setting(setting: str) -> tuple[list[str], Any]:
    """`node.field.inner=value` as (path, value); the value is YAML: 3, 1e-3, true, null, [1, 2], {a: 1}."""
    name, equals, text = setting.partition("=")
    path = name.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise ConfigError(f"--set {setting!r}: write it as node.field=value, for example pretrain.steps=200")
    try:
        return path, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting!r}: the value is not YAML ({str(error).splitlines()[0]})") from None


def _targets(pipeline: Pipeline, name: str) -> list[str]:
    """The node of that name, or else every node of the stage of that name."""
    if name in pipeline.by_name:
        return [name]
    of_stage = [node.name for node in pipeline.nodes if node.stage == name]
    if not of_stage:
        names = {*pipeline.by_name, *(node.stage for node in pipeline.nodes)}
        raise ConfigError(f"--set: pipeline {pipeline.name} has no node or stage {name!r}; {nearest(name, names)}")
    return of_stage


def _resolved(
    kind: type[Config], values: Values, changes: list[tuple[list[str], Any]], where: str, name: str
) -> Config:
    """The checked config of `values` with the changes applied in order."""
    changed = f"--set {name}"
    try:
        config = kind.parse(values, where)
    except ConfigError:
        if not changes:
            raise
        # What it lacks may be what they give: a whole field first, and then what is inside of one.
        changed = where
        changes = sorted(changes, key=lambda change: len(change[0]) > 1)
    for path, value in changes:
        if len(path) == 1:
            _check_field(kind, path[0], f"--set {name}")
            values = {**values, path[0]: value}
        else:
            values = _changed(kind.parse(values, changed), values, path, value, f"--set {name}")
    return kind.parse(values, changed) if changes else config


def _check_field(kind: type[BaseModel], name: str, where: str) -> None:
    if name not in kind.model_fields:
        raise ConfigError(f"{where}: no field {name!r}; {nearest(name, kind.model_fields)}")


def _changed(model: BaseModel, values: Values, path: list[str], value: Any, where: str) -> dict[str, Any]:
    """Values with one field, however deep, replaced.

    Only what was given is carried over, so that what a config derives from other fields is derived anew.
    """
    name, rest = path[0], path[1:]
    _check_field(type(model), name, where)
    if not rest:
        return {**values, name: value}
    inner = getattr(model, name)
    if inner is None:
        raise ConfigError(
            f"{where}.{name} is not set, so {'.'.join(rest)!r} in it cannot be changed: "
            f"give it whole, {where}.{name}='{{{rest[0]}: …}}' with every field that it needs"
        )
    if not isinstance(inner, BaseModel):
        raise ConfigError(f"{where}.{name} is a plain value: there is no {'.'.join(rest)!r} in it")
    given = values[name] if name in values else inner.model_dump(exclude_unset=True)
    return {**values, name: _changed(inner, given, rest, value, f"{where}.{name}")}
