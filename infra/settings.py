"""Where things are and how much of the machine to use: `FATHOM_*` variables or `fathom.toml`. Never identity."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from infra.config import explain
from infra.errors import ConfigError


def cores() -> int:
    """CPUs that this process may use: under a container or taskset, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Settings(BaseSettings):
    """Context of every run. A variable wins over the file, the file over the default."""

    model_config = SettingsConfigDict(env_prefix="FATHOM_", toml_file="fathom.toml", extra="forbid", frozen=True)

    store: str = Field(".fathom", description="artifact store: a folder, or any fsspec URL such as s3://bucket/path")
    workspace: Path | None = Field(None, description="local folder for drafts, scratch and cache (default: the store)")
    workers: int = Field(cores(), ge=1, description="workers of a stage; what runs a model has one a GPU at most")
    ray_address: str | None = Field(None, description="a running Ray cluster; RAY_ADDRESS works too; default: local")
    object_store_mb: int = Field(512, ge=80, description="shared memory of a local Ray, capped by half of /dev/shm")
    cost_per_hour: float | None = Field(None, ge=0, description="price of this machine, for the cost in manifests")
    prefect_port: int = Field(4200, description="port of the Prefect server that `fathom up` starts")
    explorer_port: int = Field(4280, description="port of the artifact explorer that `fathom up` starts")

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """Read the environment and the file; raise ConfigError naming a setting that cannot be used."""
        names = {f"FATHOM_{name}".upper() for name in cls.model_fields}
        for variable in os.environ:
            # Other variables of ours may exist (Kubernetes makes some from service names): only near misses are errors.
            close = difflib.get_close_matches(variable.upper(), names, n=1, cutoff=0.9)
            if variable.upper().startswith("FATHOM_") and close and variable.upper() not in names:
                raise ConfigError(f"settings: no variable {variable}; did you mean {close[0]}?")
        try:
            return cls(**overrides)
        except ValidationError as error:
            raise ConfigError(explain(cls, error, "settings (FATHOM_* or fathom.toml)")) from None
        except (ValueError, OSError) as error:  # not TOML, not UTF-8, not a file to read
            raise ConfigError(f"fathom.toml: {error}") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)
