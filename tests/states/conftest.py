"""Small models, and a place of their own for named states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from talker import talker as make_talker

import rodimus_mlx
from rodimus_mlx.loading import DEMO_FOLDER


@pytest.fixture(scope="session")
def demo() -> tuple[Any, Any]:
    return rodimus_mlx.load(DEMO_FOLDER)


@pytest.fixture(scope="session")
def talker() -> tuple[Any, Any]:
    return make_talker()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RODIMUS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
