"""The server: state in SQL, models and updates as blobs, rounds that survive `kill -9`.

Names are imported when they are first used: an operator's command, which speaks to a server through
its folder, loads neither SQLAlchemy nor what serves.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potluck.server.enrolment import Enrolled
    from potluck.server.look import Assigned, Attributes, Finished, Wait
    from potluck.server.reports import Accepted, Claims, Upload
    from potluck.server.service import Service
    from potluck.server.settings import RoundSettings

_HOMES = {
    "enrolment": ("Enrolled",),
    "look": ("Assigned", "Attributes", "Finished", "Wait"),
    "reports": ("Accepted", "Claims", "Upload"),
    "service": ("Service",),
    "settings": ("RoundSettings",),
}

__all__ = [
    "Accepted",
    "Assigned",
    "Attributes",
    "Claims",
    "Enrolled",
    "Finished",
    "RoundSettings",
    "Service",
    "Upload",
    "Wait",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"potluck.server.{home}"), name)
    raise AttributeError(f"module 'potluck.server' has no attribute {name!r}")
