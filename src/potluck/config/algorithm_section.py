"""[algorithm]: a table for each algorithm, optimizer and schedule, made from its dataclass.

Keys, defaults and ranges are those of its fields. An algorithm has a name in experiments and plans
once it stands in `ALGORITHMS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import reduce
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeAlias,
    get_type_hints,
)

from annotated_types import Interval
from pydantic import Tag, create_model

from potluck.algorithms import (
    Adagrad,
    Adam,
    Algorithm,
    Average,
    FedAvg,
    FedProx,
    Momentum,
    Nesterov,
    Scaffold,
    Schedule,
    ServerOptimizer,
    Yogi,
    schedules,
)
from potluck.config.section import Section, named
from potluck.core import (
    ClientAdam,
    ClientAdamW,
    ClientMomentum,
    ClientNesterov,
    ClientOptimizer,
    ClientSGD,
)

_BatchSize: TypeAlias = Annotated[int, Interval(ge=1)] | Literal["full"]


class NamedSection(Section):
    """A table whose `name` chooses what it makes."""

    name: str
    makes: ClassVar[Any]


class AlgorithmSection(NamedSection):
    """The keys of all algorithms."""

    client_lr: float
    local_epochs: int
    batch_size: _BatchSize


_Sections: TypeAlias = dict[str, type[NamedSection]]


def _sections(
    kinds: Mapping[str, type],
    keys: Mapping[Any, tuple[Any, Any] | None] | None = None,
    *,
    base: type[NamedSection] = NamedSection,
    default: str | None = None,
) -> _Sections:
    """A table for each name.

    Args:
        keys: type and default of a key, by name or by the field's type, where they are not those
            of the field; None where a table has no such key.
        default: the name that is meant where none is given.
    """
    found: _Sections = {}
    for name, kind in kinds.items():
        hints, keys = get_type_hints(kind, include_extras=True), keys or {}
        own: dict[str, Any] = {"name": (Literal[name], name if name == default else ...)}
        for field in fields(kind):
            hint = hints[field.name]
            usual = hint, ... if field.default is MISSING else field.default
            own[field.name] = keys.get(field.name, keys.get(hint, usual))
        own = {key: value for key, value in own.items() if value is not None}
        title = f"{kind.__name__}_{name}"
        found[name] = create_model(title, __base__=base, __module__=__name__, **own)
        found[name].makes = kind
        globals()[title] = found[name]  # where pickle looks for it
    return found


def _one_of(sections: _Sections, default: str | None = None) -> Any:
    tagged: list[Any] = [Annotated[section, Tag(name)] for name, section in sections.items()]
    return Annotated[reduce(lambda union, one: union | one, tagged), named(default)]


_FACTORS = _sections(
    {
        "constant": schedules.Constant,
        "exponential": schedules.Exponential,
        "step": schedules.Step,
        "linear": schedules.Linear,
        "cosine": schedules.Cosine,
    }
)
_CONSTANT = _FACTORS["constant"](name="constant")
_WARMUP = _sections({"warmup": schedules.Warmup}, {"then": (_one_of(_FACTORS), _CONSTANT)})
SERVERS = _sections(
    {
        "average": Average,
        "momentum": Momentum,
        "nesterov": Nesterov,
        "adagrad": Adagrad,
        "adam": Adam,
        "yogi": Yogi,
    },
    default="average",
)
CLIENTS = _sections(
    {
        "sgd": ClientSGD,
        "momentum": ClientMomentum,
        "nesterov": ClientNesterov,
        "adam": ClientAdam,
        "adamw": ClientAdamW,
    }
)
_KEYS = {
    "batch_size": (_BatchSize, 10),
    ClientOptimizer: (_one_of(CLIENTS) | None, None),
    Schedule: (_one_of(_FACTORS | _WARMUP) | None, None),
    ServerOptimizer: (_one_of(SERVERS, "average"), SERVERS["average"](name="average")),
}
_PLAIN = {ClientOptimizer: None}
_ONE_STEP = {"local_epochs": (Literal[1], 1), "batch_size": (Literal["full"], "full")}
ALGORITHMS = {
    **_sections({"fedavg": FedAvg}, _KEYS, base=AlgorithmSection, default="fedavg"),
    **_sections({"fedsgd": FedAvg}, _KEYS | _PLAIN | _ONE_STEP, base=AlgorithmSection),
    **_sections({"fedprox": FedProx}, _KEYS, base=AlgorithmSection),
    **_sections({"scaffold": Scaffold}, _KEYS | _PLAIN, base=AlgorithmSection),
}

if TYPE_CHECKING:
    AlgorithmTable: TypeAlias = AlgorithmSection
else:
    AlgorithmTable = _one_of(ALGORITHMS, "fedavg")


class _NamesAlgorithm(Protocol):
    @property
    def algorithm(self) -> AlgorithmSection: ...


def build_algorithm(named: _NamesAlgorithm) -> Algorithm:
    """The algorithm of an experiment or a plan."""
    return _made(named.algorithm)


def _made(value: Any) -> Any:
    """Returns the object that a key's value stands for: of a table, the object it makes."""
    if not isinstance(value, NamedSection):
        return None if value == "full" else value
    # A key without a value has the default of what is made.
    given = {key: _made(each) for key, each in value if key != "name" and each is not None}
    return type(value).makes(**given)
