"""Lepton: push a trained model, serve it, call it. `lepton.push(model, name="digits")`, `lepton.Client()`.

Names are loaded when they are first used, so that the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton.client import AsyncClient, Client, push
    from lepton.errors import LeptonError
    from lepton.flow import Progress

__all__ = ["AsyncClient", "Client", "LeptonError", "Progress", "push"]

_MODULES = {
    "AsyncClient": "lepton.client",
    "Client": "lepton.client",
    "LeptonError": "lepton.errors",
    "Progress": "lepton.flow",
    "push": "lepton.client",
}


if not TYPE_CHECKING:  # To a type checker it would make every name exist.

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'lepton' has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)
