"""The server: state in SQL, models and updates as blobs, rounds that survive `kill -9`."""

from potluck.server.enrolment import Enrolled
from potluck.server.look import Assigned, Attributes, Finished, Wait
from potluck.server.reports import Accepted, Claims, Upload
from potluck.server.service import Service
from potluck.server.settings import RoundSettings

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
