"""The package's public names, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import rodimus_mlx

HEAVY = ("mlx", "mlx_lm", "numpy", "transformers", "tokenizers", "huggingface_hub", "sentencepiece", "jinja2", "tqdm")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_exported_names() -> None:
    assert rodimus_mlx.__all__ == [
        "RodimusError",
        "RodimusWarning",
        "__version__",
        "generate",
        "load",
        "load_model",
        "recurrence",
        "register",
        "stream_generate",
    ]
    for name in rodimus_mlx.__all__:
        assert getattr(rodimus_mlx, name) is not None
    assert set(rodimus_mlx.__all__) <= set(dir(rodimus_mlx))


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        getattr(rodimus_mlx, "lod")  # noqa: B009


def test_import_is_light() -> None:
    assert python(f"import sys, rodimus_mlx; print([m for m in {HEAVY} if m in sys.modules])") == "[]\n"


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import rodimus_mlx.recurrence",
        "from rodimus_mlx.recurrence import recurrence",
        "import rodimus_mlx.model",
        "from rodimus_mlx import recurrence",
        "import rodimus_mlx; rodimus_mlx.load",
    ],
)
def test_recurrence_is_the_function(before: str) -> None:
    code = "import rodimus_mlx, sys; print(rodimus_mlx.recurrence is sys.modules['rodimus_mlx.recurrence'].recurrence)"
    assert python(f"{before}\n{code}") == "True\n"
