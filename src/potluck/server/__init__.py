"""The server: state in SQL, models and updates as blobs, rounds that survive `kill -9`.

Names are imported when they are first used. So an operator's command, which reaches a server
through its folder, loads neither SQLAlchemy nor the server.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potluck.config.round_settings import RoundSettings
    from potluck.server.service import Service

_HOMES = {
    "potluck.server.service": ("Service",),
    "potluck.config.round_settings": ("RoundSettings",),
}

__all__ = ["RoundSettings", "Service"]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'potluck.server' has no attribute {name!r}")
