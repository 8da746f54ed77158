"""What every test has: one thread a process, no network, settings of nobody's, and a Ray session ended with the run."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

import pytest

HOME = tempfile.mkdtemp(prefix="fathom-tests-")

# Before anything imports torch, prefect or transformers: they read these once.
for name in [name for name in os.environ if name.startswith(("FATHOM_", "PREFECT_")) or name == "RAY_ADDRESS"]:
    del os.environ[name]
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "PREFECT_HOME": f"{HOME}/prefect",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_COLORS": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "MPLBACKEND": "Agg",
}


def pytest_unconfigure(config: pytest.Config) -> None:
    if "ray" in sys.modules:
        from infra.ray import shutdown

        shutdown()
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_session() -> None:
    """A local Ray with two logical CPUs or more, shared by all tests of this process."""
    from infra.ray import session
    from infra.settings import Settings

    session(Settings(workers=2, object_store_mb=128))
