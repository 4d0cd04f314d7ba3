"""Small models, and a place of their own for named states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import TINY_FOLDER
from talker import talker as make_talker

import rodimus_mlx


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    return rodimus_mlx.load(TINY_FOLDER)


@pytest.fixture(scope="session")
def talker() -> tuple[Any, Any]:
    return make_talker()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RODIMUS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
