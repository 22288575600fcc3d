"""Who takes part in which workload, set up how; and why not, where somebody does not."""

from __future__ import annotations

from typing import NamedTuple


class Contender(NamedTuple):
    """A contender and a way to set it up."""

    name: str  # of the file contender_<name>.py, and of its environment
    variant: str

    def __str__(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name

    @property
    def environment(self) -> str:
        """The name of its virtual environment."""
        return "fedjax-newest" if self.variant.endswith("newest JAX") else self.name


OURS = ("potluck", "bare")  # run in the environment that runs the benchmark
PEERS = ("flower", "pfl", "fedjax", "nvflare", "fedlab")
ENVIRONMENTS = ("flower", "pfl", "fedjax", "fedjax-newest", "nvflare", "fedlab")

_POTLUCK = {
    "a": ("auto", "loop", "workers"),
    "b": ("auto", "loop", "workers", "vmap"),
    "c": ("auto", "loop", "workers", "vmap"),
    "d-equal": ("auto", "loop", "workers", "workers, bf16"),
    "d-natural": ("auto", "loop", "workers", "workers, bf16"),
    "e": ("auto", "vmap"),
    "f": ("auto", "loop", "workers", "vmap"),
}
_BARE = {
    "a": ("1", "2"),
    "b": ("1", "2"),
    "c": ("1",),
    "d-equal": ("1", "2"),
    "d-natural": ("1", "1 trimmed"),
    "e": ("1",),
    "f": ("1",),
}
_PEERS = {
    "flower": ("2 actors",),
    "pfl": ("2 processes",),
    "fedjax": ("jit", "pmap", "jit, newest JAX"),
    "nvflare": ("2 threads",),
    "fedlab": ("1 thread",),
}
# What was tried and is left out, with the reason that the table gives.
ABSENT: dict[tuple[str, str], str] = {
    ("nvflare", part): f"not measured: it takes half a minute for a round of b's 10 clients, and "
    f"here {why}."
    for part, why in {
        "a": "a client has 3 s of work of its own, too",
        "c": "a round has 100 clients",
        "d-equal": "a client has 0.2 s of work of its own, too",
        "d-natural": "a client has 0.2 s of work of its own, too",
        "e": "a round has 1,000 clients",
        "f": "a round has 100 clients",
    }.items()
}


def contenders(workload: str) -> list[Contender]:
    """All who take part in a workload, in the order of their turns."""
    found = [Contender("potluck", v) for v in _POTLUCK[workload]]
    found += [Contender("bare", v) for v in _BARE[workload]]
    for name, variants in _PEERS.items():
        if (name, workload) in ABSENT or (name, "") in ABSENT:
            continue
        on_torch = name != "fedjax"
        for variant in variants:
            found.append(Contender(name, variant))
            if workload == "d-natural" and on_torch:
                found.append(Contender(name, f"{variant}, trimmed"))
    return found
