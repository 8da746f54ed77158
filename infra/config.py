"""Configs: frozen pydantic models that refuse unknown keys and say the nearest right name.

A config is identity: every field is hashed into the artifact's id, so nothing that merely says *where* or *how
fast* (paths, worker counts, hosts) belongs in one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.errors import ConfigError

__all__ = ["Config", "Field", "explain", "nearest"]


class Config(BaseModel):
    """Base of every stage's config. Frozen, no unknown keys, defaults validated, fields titled by their names."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        field_title_generator=lambda name, _: name.replace("_", " ").capitalize(),
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Validate `values`; raise ConfigError that names each field, what is wrong with it and the nearest name."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(explain(cls, error, where or cls.__name__)) from None

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).parse({**self.model_dump(), **changes})


def explain(model: type[BaseModel], error: ValidationError, where: str) -> str:
    """One line per problem of a pydantic error, with the nearest right name for an unknown key."""
    lines = []
    for problem in error.errors(include_url=False):
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            names = _field_names(model, problem["loc"][:-1])
            lines.append(f"{where}: no field {path!r}; {nearest(str(problem['loc'][-1]), names)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if problem["type"] in ("missing", "value_error") else f" (got {problem['input']!r})"
            lines.append(f"{where}{'.' + path if path else ''}: {message}{given}")
    return "\n".join(lines)


def _field_names(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that `loc` leads to, as far as plain nesting can be followed."""
    for part in loc:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return list(model.model_fields)


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a wrong name: the nearest right one, or all of them if they are few."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
    return f"choose from {shown}" if names else "none exist"
