"""Rodimus and Rodimus+ language models on Apple Silicon, through MLX.

Names are imported when first used, so that ``import rodimus_mlx`` costs nothing (no mlx, no numpy).
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import RodimusError, RodimusWarning
from .version import __version__

if TYPE_CHECKING:
    from .generation import generate, stream_generate
    from .loading import load, load_model, register
    from .recurrence import recurrence

__all__ = [
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

_HOME = {
    "generate": "generation",
    "stream_generate": "generation",
    "load": "loading",
    "load_model": "loading",
    "register": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``rodimus_mlx.recurrence`` the function.

    Importing a submodule sets the package's attribute of that name to the module. A property outranks that
    assignment whichever is imported first; ``from rodimus_mlx.recurrence import ...`` still reaches the module.
    """

    @property
    def recurrence(self) -> Any:
        return import_module(".recurrence", __name__).recurrence

    @recurrence.setter
    def recurrence(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
