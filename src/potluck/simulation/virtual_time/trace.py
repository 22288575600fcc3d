"""Devices from a trace file, a CSV file with a line for every window of every device.

    device    examples_per_second  …  dropout  check_in_seconds  from_hour  to_hour
    ward-3    850                     0.01     0                 0          24
    phone-17  90                      0.08     900               22.5       30
    phone-17  90                      0.08     900               13         14

Hours are UTC; 30 is six in the morning of the next day. The windows of a file come again every day,
or every `days` days. Hours then go on counting: 37 is the second day's 13. A device with several
windows has several lines, which differ in their hours only. Client k runs on the k-th device, in
the order in which the devices first appear.
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from potluck.core import ConfigError
from potluck.core.text_files import read_text
from potluck.core.validate import as_count
from potluck.simulation.virtual_time.fleet import DAY_SECONDS, Fleet

COLUMNS = (
    "device",
    "examples_per_second",
    "uplink_bytes_per_second",
    "downlink_bytes_per_second",
    "dropout",
    "check_in_seconds",
    "from_hour",
    "to_hour",
)
_HOUR = 3600.0


class _Line(NamedTuple):
    device: str
    fixed: tuple[float, ...]  # speed, uplink, downlink, dropout, seconds between check-ins
    window: tuple[float, float]  # hours


def read_trace(
    path: Path | str, population: int, *, days: int = 1, start_hour: float = 0.0
) -> Fleet:
    """The fleet that a trace file describes; devices beyond the population are not used.

    Args:
        days: after so many the windows come again.
        start_hour: the hour, UTC, of the file at virtual time 0.

    Raises:
        ConfigError: the file cannot be read, a line is wrong, or there are too few devices.
    """
    population, days = as_count("population", population), as_count("days", days)
    found: dict[str, list[_Line]] = {}
    for number, row in _rows(Path(path)):
        line = _line(f"{path}, line {number}", row, 24.0 * days)
        lines = found.setdefault(line.device, [])
        if lines and lines[0].fixed != line.fixed:
            raise ConfigError(
                f"{path}, line {number}: the lines of a device must differ in their hours only, "
                f"got device={line.device!r} with {line.fixed} after {lines[0].fixed}. Make them "
                "the same."
            )
        lines.append(line)
    if len(found) < population:
        raise ConfigError(
            f"{path} must have a device for every client ({population}), got {len(found)} devices. "
            "Add some, or set partition.clients to at most as many."
        )
    devices = list(found.values())[:population]
    fixed = np.array([lines[0].fixed for lines in devices])
    starts = np.zeros((population, max(map(len, devices))))
    lengths = np.zeros_like(starts)
    for k, lines in enumerate(devices):
        for j, line in enumerate(lines):
            starts[k, j] = (line.window[0] - start_hour) * _HOUR
            lengths[k, j] = (line.window[1] - line.window[0]) * _HOUR
    return Fleet(
        examples_per_second=fixed[:, 0],
        uplink_bytes_per_second=fixed[:, 1],
        downlink_bytes_per_second=fixed[:, 2],
        dropout=fixed[:, 3],
        check_in_seconds=fixed[:, 4],
        starts=starts,
        lengths=lengths,
        period_seconds=days * DAY_SECONDS,
    )


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """The lines behind the header, with their numbers."""
    try:
        reader = csv.reader(io.StringIO(read_text(path)), strict=True)
        header = tuple(next(reader, ()))
        rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise ConfigError(
            f"devices.trace must be a readable file, got path={str(path)!r} ({error.strerror}). "
            "Name a CSV file."
        ) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except csv.Error as error:
        raise ConfigError(f"{path} must be a CSV file: {error}. Write it anew.") from None
    if header != COLUMNS:
        raise ConfigError(
            f"{path}: the first line must be {','.join(COLUMNS)!r}, got {','.join(header)!r}. "
            "Name the columns so, in this order."
        )
    return rows


def _line(place: str, row: list[str], period: float) -> _Line:
    if len(row) != len(COLUMNS):
        raise ConfigError(
            f"{place}: a line must have {len(COLUMNS)} values, got {len(row)}. "
            f"They are {', '.join(COLUMNS)}."
        )
    if not row[0]:
        raise ConfigError(f"{place}: device must have a name, got device=''. Give it one.")
    values = [_number(place, name, text) for name, text in zip(COLUMNS[1:], row[1:], strict=True)]
    *fixed, start, end = values
    dropout, interval = fixed[3:]
    for name, value in zip(COLUMNS[1:4], values, strict=False):
        if value <= 0.0:
            raise ConfigError(f"{place}: {name} must be above 0, got {name}={value:g}.")
    if not 0.0 <= dropout <= 1.0:
        raise ConfigError(
            f"{place}: dropout must be a probability from 0 to 1, got dropout={dropout:g}. "
            "For 8 % write 0.08."
        )
    if not 0.0 <= interval <= 24 * 3600:
        raise ConfigError(
            f"{place}: check_in_seconds must be from 0 to 86400, got "
            f"check_in_seconds={interval:g}. Use 0 for a device that waits at the server."
        )
    if not 0.0 <= start < period or not start < end <= start + period:
        raise ConfigError(
            f"{place}: from_hour must be at least 0 and below {period:g}, and to_hour after it by "
            f"at most {period:g}, got from_hour={start:g}, to_hour={end:g}. A window from 22:00 to "
            "06:00 is from 22 to 30."
        )
    return _Line(row[0], tuple(fixed), (start, end))


def _number(place: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{place}: {name} must be a number, got {name}={text!r}.")
    return value
