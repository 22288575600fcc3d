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
    "d-equal": ("auto", "loop", "workers"),
    "d-natural": ("auto", "loop", "workers"),
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
    ("nvflare", ""): "not measured. Its simulator starts processes for clients: rounds of 4 "
    "clients of c's miniature took 10 and 11 s (NVFlare 2.9.0, alone on the machine), so that the "
    "cohorts of 10 to 1,000 would take half a minute to most of an hour a round.",
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
