"""A device: keeps its data, and sends updates of a model. Imports neither a server nor PyTorch."""

from potluck.device.agent import Agent, Event
from potluck.device.clock import Clock, Stopped, SystemClock
from potluck.device.connection import Connection
from potluck.device.consent import Ask
from potluck.device.eligibility import LinuxSensor, Sensor
from potluck.device.enrol import enrol, join, run_until_stopped
from potluck.device.folder import Enrolment, Home
from potluck.device.owner_data import check_own, one_client, read_own
from potluck.device.policy import DeclinedError, Policy, load_policy
from potluck.device.sent_log import DailyLimitError, Record
from potluck.device.trainer import TorchTrainer, Trainer

__all__ = [
    "Agent",
    "Ask",
    "Clock",
    "Connection",
    "DailyLimitError",
    "DeclinedError",
    "Enrolment",
    "Event",
    "Home",
    "LinuxSensor",
    "Policy",
    "Record",
    "Sensor",
    "Stopped",
    "SystemClock",
    "TorchTrainer",
    "Trainer",
    "check_own",
    "enrol",
    "join",
    "load_policy",
    "one_client",
    "read_own",
    "run_until_stopped",
]
