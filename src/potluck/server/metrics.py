"""Numbers for Prometheus. Labels have few values: paths are templates, never what was asked for."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0)


class Metrics:
    """One server process's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        shared: dict[str, Any] = {"registry": self._registry}
        labels = ("method", "path", "status")
        self._requests = Counter("potluck_requests", "Requests answered.", labels, **shared)
        self._seconds = Histogram(
            "potluck_request_seconds", "Time to answer.", ("path",), buckets=_BUCKETS, **shared
        )
        self.received = Counter("potluck_upload_bytes", "Bytes of updates.", **shared)
        self.sent = Counter("potluck_download_bytes", "Bytes of models.", **shared)
        self.polls = Gauge("potluck_waiting_check_ins", "Check-ins held open.", **shared)
        self.errors = Counter("potluck_leader_errors", "Ticks that failed.", **shared)
        self.lost = Counter(
            "potluck_lost", "Stored updates and models that could not be read any more.", **shared
        )
        self._state = {
            name: Gauge(f"potluck_{name}", text, **shared)
            for name, text in (
                ("round", "The last committed round."),
                ("attempt", "At the next round."),
                ("devices", "Enrolled and not revoked."),
                ("active", "Devices at work in the open round."),
                ("reported", "Reports of the open round."),
                ("is_leader", "Whether this process leads."),
                ("paused", "Whether the run is paused."),
                ("alarms", "Devices that asked for more than half of a round."),
            )
        }

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def state(self, status: dict[str, Any]) -> None:
        """Takes the numbers of a run's status."""
        open_round: dict[str, Any] = status["open"] or {}
        values = status | {"active": 0, "reported": 0} | open_round
        values |= {"attempt": status["attempt"], "paused": status["state"] == "paused"}
        for name, gauge in self._state.items():
            gauge.set(float(values[name]))

    def text(self) -> bytes:
        """Returns all of them, as Prometheus reads them."""
        return generate_latest(self._registry)
