"""A program that serves a whole run to its own four devices, and may be killed at any moment.

    python mortal.py URL BLOBS ROUNDS            serve until the run is finished, then print it
    python mortal.py URL BLOBS ROUNDS POINT …    for each point: a fresh run, killed there, resumed
    python mortal.py URL BLOBS ROUNDS --random N SEED    killed at N random times, then resumed

It forks, and loads no PyTorch, so that a life costs milliseconds. `URL` and `BLOBS` may hold `{}`,
which becomes the point's index.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
import traceback

import numpy as np

from messages import arrival, begin, check_in, claims, device_of, read_version
from potluck.algorithms import FedAvg, Momentum
from potluck.config.experiment import check_experiment
from potluck.core import RefusedError, Spec
from potluck.protocol import Accepted, Finished, fingerprint
from potluck.server import RoundSettings, Service
from potluck.server.rounds import audit_check
from potluck.server.rounds.check_in import Assigned
from potluck.server.rounds.enrolment import enrol, issue_tokens
from potluck.server.rounds.inline_reports import accept_batch
from potluck.server.rounds.leases import extend_lease, fail
from potluck.server.rounds.uploads import append_chunk, finish_report

NUM = 4
KEYS = [bytes([i]) * 32 for i in range(NUM)]
CONTENT = {
    "name": "mortal",
    "task": {"data": "digits", "model": "2nn"},
    "partition": {"kind": "iid", "clients": NUM},
    "algorithm": {"client_lr": 0.1},
    "run": {"rounds": 1, "cohort": NUM},
}


def live(url: str, blobs: str, num_rounds: int) -> dict:
    """Do what is left to do, from whatever there is; return what can be seen at the end."""
    average = Momentum(momentum=0.0)  # whose state is a blob, as the small model is none
    algorithm = FedAvg(client_lr=0.1, server=average)
    service = Service.open(url, blobs, build=lambda _: algorithm, lease_seconds=0.02)
    settings = RoundSettings(
        selection="sampled", goal=NUM, minimum=1.0, population=NUM, num_rounds=num_rounds
    )
    experiment = check_experiment(CONTENT, "mortal")
    spec = Spec(("w",), ((NUM,),))
    run = service.create_run(experiment, np.zeros(NUM, np.float32), spec, settings)
    for key in KEYS:
        try:
            device_of(service, fingerprint(key))
        except RefusedError:
            enrol(service, issue_tokens(service, run, actor="mortal")[0], key)
    done = False
    while not done:
        if not service.tick():
            time.sleep(0.005)  # until the lease of the one that was killed is over
        answers = [check_in(service, fingerprint(key)) for key in KEYS]
        service.tick()  # with all slots taken, on to TRAINING
        done = isinstance(answers[0], Finished)
        for i, work in enumerate(answers):
            if isinstance(work, Assigned):
                take_part(service, i, fingerprint(KEYS[i]), work)
    history = service.history(run)
    model = b"".join(read_version(service, run, num_rounds))
    assert audit_check.check(service) is None
    names = ("number", "attempt", "version", "model_sha256", "accepted", "accepted_sha256")
    result = {
        "model": hashlib.sha256(model).hexdigest(),
        "weights": np.frombuffer(model, "<f4").tolist(),
        "rounds": [{name: row[name] for name in names} for row in history],
        "enrolled": service.status(run)["devices"],
    }
    service.close()
    return result


def take_part(service: Service, i: int, device: str, work: Assigned) -> None:
    if (work.number, work.attempt, i) == (2, 1, NUM - 1):  # this attempt is to be abandoned
        fail(service, device, work.assignment, "asked to")
        return
    extend_lease(service, device, work.assignment)
    vector = np.zeros(NUM, "<f4")
    vector[work.client] = work.number
    body = vector.tobytes()
    if i % 2:
        [taken] = accept_batch(
            service, [arrival(service, device, work.assignment, vector)], "float32"
        )
        assert isinstance(taken, Accepted) or taken.code == "late", taken
        return
    upload = begin(service, device, work.assignment, claims(vector))
    if isinstance(upload, Accepted):
        return
    while upload.offset < len(body):
        chunk = body[upload.offset : upload.offset + 10]
        upload = append_chunk(service, device, upload.upload, upload.offset, chunk)
    finish_report(service, device, upload.upload)


def born(url: str, blobs: str, num_rounds: int, point: str = "") -> int:
    """A life in a process of its own. Returns the process's id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        os.environ["POTLUCK_FAULT"] = point
        result = live(url, blobs, num_rounds)
        print(json.dumps(result), flush=True)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def died(child: int) -> int:
    """How a life ended: 0 well, −9 killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(url: str, blobs: str, rounds: str, *rest: str) -> None:
    if rest[:1] == ("--random",):
        dice = random.Random(int(rest[2]))
        killed = 0
        for _ in range(int(rest[1])):
            child = born(url, blobs, int(rounds))
            time.sleep(dice.random() * float(rest[3]))
            os.kill(child, 9)
            killed += died(child) == -9
        assert killed, "the kills came too late to test anything"
        rest = ()
    if not rest:
        assert died(born(url, blobs, int(rounds))) == 0
        return
    for i, point in enumerate(rest):
        place = (url.replace("{}", str(i)), blobs.replace("{}", str(i)), int(rounds))
        assert died(born(*place, point)) == -9, f"{point} was not reached"
        assert died(born(*place)) == 0, f"no life after {point}"


if __name__ == "__main__":
    main(*sys.argv[1:])
