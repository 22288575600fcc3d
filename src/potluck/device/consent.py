"""The owner's consent to what a run does with this device's data.

    agreed.json     in the device's folder: the terms that the owner agreed to

Terms are the part of a signed manifest that stays the same from round to round. It is the run, the
model's names and shapes, the plan and the number of rounds. Any change but fewer rounds needs the
owner's consent again, whoever signed it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

from potluck.config.algorithm_section import AlgorithmSection
from potluck.config.plan import Plan
from potluck.core.atomic_files import PRIVATE, write_whole
from potluck.core.plain_json import flat
from potluck.device.folder import Home
from potluck.device.policy import DeclinedError, Policy, num_steps
from potluck.device.trainer import Trainer
from potluck.protocol import Manifest
from potluck.protocol.strict_json import encode_json

Ask: TypeAlias = Callable[[str], bool]
"""Shows the owner the terms of a run, and returns the answer."""


class Consent:
    """The terms that the owner of one device agreed to, and the way to ask.

    Args:
        key: that signs the run's manifests, in hexadecimal.
        ask: called with the terms in words where they were not agreed to yet.
    """

    def __init__(self, home: Home, policy: Policy, trainer: Trainer, key: str, ask: Ask) -> None:
        self._home, self._policy, self._trainer = home, policy, trainer
        self._key, self._ask = key, ask
        self._file = home.folder / "agreed.json"
        self._checked: dict[str, Any] | None = None

    def require(self, manifest: Manifest, plan: Plan) -> None:
        """Goes on only with terms that fit the policy and the data, and that the owner agreed to.

        A device that enrolled before terms were kept has agreed to the first that it sees.

        Raises:
            ConfigError, DataError: the data do not fit.
            DeclinedError: the policy forbids them, or the owner says no.
        """
        terms = terms_of(manifest)
        if terms == self._checked:
            return
        self._policy.check_model(manifest)
        self._policy.check_work(plan, None)
        num_examples = self._trainer.fit(plan, manifest.spec.spec())
        self._policy.check_work(plan, num_examples)
        agreed = self._agreed()
        if agreed is None and self._home.enrolment() is not None:
            agreed = terms
        changes = [] if agreed is None else differences(agreed, terms)
        if agreed is None or changes:
            told = in_words(manifest, plan, self._key, num_examples, changes)
            if not self._ask(told):
                raise DeclinedError(_declined(changes))
        write_whole(self._file, encode_json(terms), PRIVATE)
        self._checked = terms

    def _agreed(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._file.read_bytes())
        except (FileNotFoundError, ValueError):
            return None


def terms_of(manifest: Manifest) -> dict[str, Any]:
    """Returns the part of a manifest that stays the same from round to round."""
    return {
        "run": manifest.run,
        "rounds": manifest.rounds,
        "model": {"bytes": manifest.length_bytes, "spec": manifest.spec.digest},
        "plan": manifest.plan,
    }


def differences(agreed: Mapping[str, Any], terms: Mapping[str, Any]) -> list[str]:
    """Returns the keys that the owner did not agree to, with both values."""
    before, now = flat(agreed), flat(terms)
    return [
        f"{key}: {before.get(key)} → {now.get(key)}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
        and not (key == "rounds" and 0 < now[key] <= (before.get(key) or now[key]))
    ]


def in_words(
    manifest: Manifest, plan: Plan, key: str, num_examples: int | None, changes: list[str]
) -> str:
    """Returns the terms for a person, a line each."""
    task, algorithm, spec = plan.task, plan.algorithm, manifest.spec.spec()
    size = f"{manifest.length_bytes:,} bytes"
    steps = num_steps(plan, num_examples)
    lines = {
        "run": f"{manifest.run}; what follows is signed by its key {key[:16]}…",
        "task": f"{_targets(plan)} from {_inputs(plan)}",
        "model": f"{task.model}, {spec.num_parameters:,} parameters: {size} to here in a round, "
        "and as much back, or less if encoded",
        "training": f"{algorithm.name}: {algorithm.local_epochs} local epochs (E) in batches of "
        f"{algorithm.batch_size} (B), {_rates(algorithm)}",
        "rounds": f"{manifest.rounds or 'not said'}",
        "here": f"{_known(num_examples)} examples, {_known(steps)} local steps a round",
        "only while": ", ".join(plan.needs),
        "leaves": "updates, number of examples, loss, metrics of an evaluation, and the state of "
        "this machine; an update can show single examples: docs/what-leaves.md",
        "changed": "; ".join(changes),
    }
    # The names of a signed schema may hold line breaks.
    return "\n".join(
        f"{name:<10}  {' '.join(text.split())}" for name, text in lines.items() if text
    )


def _targets(plan: Plan) -> str:
    names = ", ".join(map(str, cast("list[Any]", (plan.data or {}).get("targets") or [])))
    kind = plan.task.kind or (
        f"{plan.task.num_classes} classes" if plan.task.num_classes else "a quantity"
    )
    return f"{names} ({kind})" if names else kind


def _inputs(plan: Plan) -> str:
    features = cast("list[Any]", (plan.data or {}).get("features") or [])
    names = [str(feature["name"]) for feature in features if "name" in feature]
    return f"the columns {', '.join(names)}" if names else "the inputs of this device's file"


def _rates(algorithm: AlgorithmSection) -> str:
    """Returns the rates and corrections as the plan names them."""
    told = algorithm.model_dump(exclude={"name", "local_epochs", "batch_size"}, exclude_none=True)
    return ", ".join(f"{key} {value}" for key, value in flat(told).items())


def _known(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


def _declined(changes: list[str]) -> str:
    what = f"what changed ({'; '.join(changes)})" if changes else "what the run does"
    return (
        f"the owner of the data must agree to {what}, got no. "
        "Nothing was trained for it. Give the command again to be asked again."
    )
