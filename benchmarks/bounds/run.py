"""One hostile device of ten, within what a server accepts; and what its bounds do to honest ones.

    python benchmarks/bounds/run.py --out benchmarks/bounds/results.json

`hostile` is a served run without sockets: the devices' updates are those of the simulation, but
for device 0's. `honest` simulates a run with and without bounds and counts the updates that are
touched.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from potluck.algorithms import client_update
from potluck.config.algorithm_section import build_algorithm
from potluck.config.build import build_data, build_task
from potluck.config.experiment import check_experiment
from potluck.core import ClientContext, FixedPointMean, sample_cohort
from potluck.engine import TorchRuntime, evaluate, run_of
from potluck.engine.devices import kernel_threads
from potluck.protocol import Accepted, Claim, Eligibility, Report, encode_inline
from potluck.server import RoundSettings, Service
from potluck.server.rounds.bounds import (
    WINDOW,
    Weighed,
    counted,
    limits_of,
    read_lowered,
    shortened,
)
from potluck.server.rounds.check_in import CheckInRequest, check_ins
from potluck.server.rounds.enrolment import enrol, issue_tokens
from potluck.server.rounds.inline_reports import accept_batch
from potluck.server.storage.vectors import find_version, read_model

ROUNDS = 50
FREE = {"max_weight_times": 1e9, "max_pull_times": 1e9}
IID = {"kind": "iid", "clients": 10}


def flipped(weight, delta, honest):
    """What the others want, the other way round, as large as is accepted."""
    return 1e4, -honest * (9e3 / np.linalg.norm(honest))


def own_flipped(weight, delta, honest):
    """Its own update, the other way round and three times as large."""
    return 5 * weight, -3 * delta


def at_the_limit(weight, delta, honest):
    """What the others want the other way round, at twice the pull of its own update."""
    return weight, -honest * (2 * np.linalg.norm(delta) / np.linalg.norm(honest))


def noise(weight, delta, honest):
    """The same random direction in every round."""
    return 1e6, np.random.default_rng(0).normal(size=len(delta))


def nothing(weight, delta, honest):
    """As much weight as is accepted, for no change."""
    return 1e6, delta * 1e-9


ATTACKS = (flipped, own_flipped, at_the_limit, noise, nothing)


def experiment_of(data, model, partition, *, cohort=1.0, epochs=1, rate=0.1, **task):
    content = {"name": "bounds", "task": {"data": data, "model": model} | task}
    content |= {"partition": partition, "run": {"rounds": 1000, "cohort": cohort, "seed": 7}}
    content["algorithm"] = {"client_lr": rate, "local_epochs": epochs}
    return check_experiment(content, "bounds")


class Clients:
    """The clients of an experiment, which train as in the simulation."""

    def __init__(self, experiment):
        self.experiment, self.algorithm = experiment, build_algorithm(experiment)
        self.task = build_task(experiment, build_data(experiment))
        self.runtime = TorchRuntime(self.task)

    def train(self, weights, client, number):
        size = int(self.task.data.sizes[client])
        who = ClientContext(self.experiment.run.seed, number, client, size)
        with kernel_threads(1):
            made = client_update(
                self.algorithm,
                weights,
                who,
                lambda asked: self.runtime.train(run_of(self.task, asked, who)),
            )
        return made._replace(delta=made.delta.copy())

    def score(self, weights):
        return evaluate(self.task, weights)["accuracy"]


def hostile(clients, attack=None, *, rounds=ROUNDS, order=None, **settings):
    """A served run of which device 0 is hostile: accuracy, and what `status` says of devices."""
    experiment = clients.experiment
    count, seed = clients.task.data.num_clients, experiment.run.seed
    limits = RoundSettings.sampled(experiment, num_rounds=rounds, **settings)
    with tempfile.TemporaryDirectory() as folder:
        place = f"sqlite:///{folder}/potluck.db", f"{folder}/blobs"
        service = Service.open(*place, build=build_algorithm)
        start = clients.task.initial_weights(seed)
        run = service.create_run(experiment, start, clients.runtime.spec, limits)
        tokens = issue_tokens(service, run, count, actor="benchmark")
        names = [enrol(service, t, bytes([k]) * 32).id for k, t in enumerate(tokens)]
        for number in range(1, rounds + 1):
            service.tick()
            weights = np.frombuffer(_model(service, run, number - 1), "<f4")
            works = check_ins(service, [CheckInRequest(name, Eligibility()) for name in names])
            made = [clients.train(weights, work.client, number) for work in works]
            sent = [(update.weight, update.delta) for update in made]
            if attack is not None:
                honest = np.mean([update.delta for update in made[1:]], axis=0)
                sent[0] = attack(*sent[0], honest)
            came = [_arrival(*one) for one in zip(names, works, sent, made, strict=True)]
            answers = accept_batch(service, [came[k] for k in (order or range(count))], "float32")
            if not all(isinstance(answer, Accepted) for answer in answers):
                break  # without bounds the others' updates soon are beyond what is accepted
        service.tick()
        last = service.status(run)["version"]
        weights = np.frombuffer(_model(service, run, last), "<f4").copy()
        with service.database.read() as db:
            told = read_lowered(db, run)
        service.close()
    named = [names.index(row["id"]) for row in told]
    return {"accuracy": clients.score(weights), "named": named, "weights": weights}


def _arrival(name, work, sent, update):
    body = sent[1].astype("<f4").tobytes()
    report = Report.model_construct(  # larger than a device may send inside a message
        assignment=work.assignment,
        round=work.number,
        attempt=work.attempt,
        codec="float32",
        length_bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
        weight=float(sent[0]),
        loss=update.loss,
        num_steps=update.num_steps,
        update=encode_inline(body),
    )
    return Claim(name, time.time_ns(), 0, "", b""), report


def _model(service, run, version):
    return b"".join(read_model(service, run, find_version(service, run, version)))


def honest(clients, *, rounds=ROUNDS, **settings):
    """A simulated run of honest clients with bounds: accuracy, and the share of updates that count
    for less."""
    experiment = clients.experiment
    data, seed = clients.task.data, experiment.run.seed
    limits = RoundSettings(num_rounds=rounds, **settings)
    state = clients.algorithm.server_init(clients.task.initial_weights(seed))
    before: list[list[Weighed]] = []
    touched = total = 0
    for number in range(1, rounds + 1):
        cohort = sample_cohort(data.num_clients, experiment.run.cohort, seed=seed, round=number)
        made = [clients.train(state.weights, int(client), number) for client in cohort]
        norms = [float(np.linalg.norm(u.delta.astype(np.float64))) for u in made]
        told = [Weighed(u.weight, norm, 0.0) for u, norm in zip(made, norms, strict=True)]
        earlier: list[Weighed] = []
        for old in reversed(before):
            if len(told) + len(earlier) >= WINDOW:
                break
            earlier += old
        before.append(told)
        bounds = limits_of(told, earlier, limits)
        sum = FixedPointMean(len(state.weights))
        for update, count in zip(made, counted(told, bounds), strict=True):
            sum.add(update.delta, count.weight)
            touched += count.weight < update.weight
            total += 1
        mean = shortened(sum.mean(), len(state.weights), bounds)
        state = clients.algorithm.server_update(state, mean, round=number, participation=1.0)
    return {"accuracy": clients.score(state.weights), "touched": touched / total}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    found = {"rounds": ROUNDS, "hostile": [], "honest": []}
    if out.exists():  # goes on where it was stopped
        found = json.loads(out.read_text())
    done = {(row["model"], row["attack"]) for row in found["hostile"]}
    done |= {row["data"] for row in found["honest"]}
    for model in ("logistic", "2nn"):
        clients = Clients(experiment_of("digits", model, IID))
        for attack in (None, *ATTACKS):
            if (model, attack.__name__ if attack else "none") in done:
                continue
            one = hostile(clients, attack)
            free = hostile(clients, attack, **FREE) if attack else one
            row = {"model": model, "attack": attack.__name__ if attack else "none"}
            row |= {"accuracy": one["accuracy"], "without": free["accuracy"]}
            found["hostile"].append(row | {"named": 0 in one["named"]})
            print(found["hostile"][-1], flush=True)
            out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    cases = [
        ("digits, IID", experiment_of("digits", "logistic", IID), 50),
        ("digits, two shards", experiment_of("digits", "logistic", IID | {"kind": "shards"}), 50),
    ]
    for alpha in (0.5, 0.1):
        part = IID | {"kind": "dirichlet", "alpha": alpha}
        cases.append((f"digits, Dirichlet {alpha}", experiment_of("digits", "logistic", part), 50))
    for sigma in (0.5, 1.0):
        part = IID | {"kind": "unbalanced", "sigma": sigma}
        told = f"digits, sizes log-normal {sigma}"
        cases.append((told, experiment_of("digits", "logistic", part), 50))
    user = {"data": "wisdm", "model": "logistic", "partition": {"kind": "user"}}
    role = {"data": "shakespeare", "model": "char-lstm", "partition": {"kind": "role"}}
    cases.append(("WISDM, by user", experiment_of(**user, cohort=10, rate=0.05), 20))
    cases.append(("Shakespeare, by role", experiment_of(**role, cohort=10, rate=1.0, hidden=32), 5))
    for told, experiment, rounds in cases:
        if told in done:
            continue
        clients = Clients(experiment)
        bound, free = honest(clients, rounds=rounds), honest(clients, rounds=rounds, **FREE)
        row = {"data": told, "rounds": rounds, "touched": round(bound["touched"], 4)}
        found["honest"].append(row | {"accuracy": bound["accuracy"], "without": free["accuracy"]})
        print(found["honest"][-1], flush=True)
        out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
