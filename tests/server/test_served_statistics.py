"""Statistics on their way between devices and a server: behind an update, in float32, averaged."""

import hashlib
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fleet import CONTENT, Clock
from messages import begin, check_in, claims, read_version
from potluck import Task
from potluck.config.algorithm_section import build_algorithm
from potluck.config.experiment import check_experiment
from potluck.config.plan import plan_of
from potluck.core import (
    ConfigError,
    FixedPointMean,
    ProtocolError,
    RefusedError,
    Spec,
    encode_update,
    update_bytes,
)
from potluck.core.codecs import CODECS, decode_blocks
from potluck.device import TorchTrainer, one_client
from potluck.engine.buffers import roles
from potluck.protocol import Manifest, ManifestSpec, Wait, sign_manifest, verify_manifest
from potluck.protocol.keys import public_key
from potluck.server import RoundSettings, Service
from potluck.server.rounds.aggregate import BLOCK, Stored, aggregate, check_update
from potluck.server.rounds.enrolment import enrol, issue_tokens
from potluck.server.rounds.uploads import append_chunk, finish_report
from potluck.server.storage.vectors import read_spec, write_spec
from potluck.simulation import build_data, rounds

SPEC = Spec.of_packed(("w", "b", "mean", "count"), ((40, 30), (7,), (5,), ()), 2)
TRAINED, AVERAGED = 1207, 6


def body_of(vector, codec, spec=SPEC):
    encoded = encode_update(
        vector,
        codec,
        None,
        seed=1,
        round=2,
        client=3,
        num_statistics=spec.dim - spec.num_parameters,
    )
    return encoded.body


def vector_of(seed, spec=SPEC):
    vector = np.random.default_rng(seed).normal(size=spec.dim).astype(np.float32)
    vector[spec.num_parameters :] *= 1e6
    return vector


@pytest.mark.parametrize("size", [1, 7, 1024, 5000])
@pytest.mark.parametrize("codec", CODECS)
def test_statistics_lie_behind_an_update_unrounded(codec, size):
    vector = vector_of(0)
    body = body_of(vector, codec)
    assert len(body) == update_bytes(codec, SPEC)
    pieces = [body[k : k + size] for k in range(0, len(body), size)]
    decoded = np.concatenate(list(decode_blocks(pieces, codec, TRAINED, AVERAGED)))
    np.testing.assert_array_equal(decoded[TRAINED:], vector[TRAINED:])
    step = {"float32": 0.0, "bfloat16": 2**-7 * 4, "int8": 4 / 127, "int4": 4 / 7}[codec]
    assert np.abs(decoded - vector).max() <= step
    for wrong in (body[:-4], body + bytes(4)):
        with pytest.raises(ProtocolError) as refused:
            list(decode_blocks([wrong], codec, TRAINED, AVERAGED))
        assert refused.value.code == "wrong_length"


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_norm_is_of_what_is_trained_and_statistics_may_be_large(codec):
    experiment = check_experiment(CONTENT, "test")
    limits = RoundSettings.sampled(experiment).model_copy(update={"max_norm": 50.0})
    settings = {"weight": 600.0, "slots": 100, "settings": limits}
    vector = vector_of(1)
    body = body_of(vector, codec)
    check_update(iter([body]), codec, SPEC, hashlib.sha256(body).hexdigest(), **settings)
    for entry, value, words in (
        (3, 1e3, "a norm of at most 50"),
        (TRAINED + 1, 1e15, "weight times the largest entry"),
    ):
        bad = vector.copy()
        bad[entry] = value
        body = body_of(bad, codec)
        with pytest.raises(RefusedError, match=words):
            check_update(iter([body]), codec, SPEC, hashlib.sha256(body).hexdigest(), **settings)
    body = body_of(vector, codec)[:-4] + np.array([math.inf], "<f4").tobytes()
    with pytest.raises(RefusedError) as refused:
        check_update(iter([body]), codec, SPEC, hashlib.sha256(body).hexdigest(), **settings)
    assert refused.value.code == "not_finite"


def test_a_server_sums_statistics_to_the_bits_of_a_simulation():
    spec = Spec.of_packed(("w", "s"), ((BLOCK + 9,), (BLOCK + 5,)), 1)
    vectors, weights = [vector_of(i, spec) for i in range(3)], [1.0, 600.0, 2.5]
    mean = FixedPointMean(spec.dim, wide=BLOCK + 5)
    for vector, weight in zip(vectors, weights, strict=True):
        mean.add(vector, weight)

    def stored(i, cut):
        body = body_of(vectors[i], "float32", spec)
        pieces = [body[k : k + cut] for k in range(0, len(body), cut)]
        digest = hashlib.sha256(body).hexdigest()
        return Stored(i, digest, weights[i], "float32", lambda: iter(pieces))

    for order, cut in (((0, 1, 2), 1 << 20), ((2, 0, 1), 99_991)):
        found = aggregate([stored(i, cut) for i in order], spec)
        np.testing.assert_array_equal(found, mean.mean())


def test_a_manifest_tells_how_many_tensors_are_statistics():
    key = bytes(range(32))
    common = {"version": 1, "previous": 0, "run": "r", "round": 0, "plan": {}}
    common |= {"sha256": "0" * 64, "created_ms": 1, "expires_ms": 2}
    plain = Spec(("w",), ((2,),))
    for spec, is_told in ((SPEC, True), (plain, False)):
        manifest = Manifest(spec=ManifestSpec.of(spec), length_bytes=spec.num_bytes, **common)
        data, signature = sign_manifest(key, manifest)
        assert (b'"num_statistics":2' in data) == is_told
        assert (b"num_statistics" in data) == is_told
        read = verify_manifest(
            data, signature, public_key(key), run="r", now_ms=1, last_seen_version=0
        )
        assert read.spec.spec() == spec
        assert read_spec(write_spec(spec)) == spec
    other = ManifestSpec.of(SPEC).model_copy(update={"num_statistics": 1})
    for wrong in (other, ManifestSpec.of(plain).model_copy(update={"num_statistics": 1})):
        manifest = Manifest(spec=wrong, length_bytes=4 * wrong.spec().dim, **common)
        with pytest.raises(ValueError, match=r"spec\.(digest|num_statistics)"):
            sign_manifest(key, manifest)


class Net(nn.Module):
    """A frozen layer, normalization, a counter and an infinite constant."""

    def __init__(self, writes_late=False):
        super().__init__()
        self.frozen = nn.Linear(64, 16).requires_grad_(False)
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.register_buffer("seen", torch.tensor(1e6))
        self.register_buffer("limit", torch.tensor([-math.inf, 5.0]))
        self.writes_late = writes_late

    def forward(self, inputs):
        if self.training:
            self.seen += 1.0
            if self.writes_late and self.seen > 1e6 + 4:
                self.limit[1] = 4.0
        return self.head(self.norm(self.frozen(inputs.flatten(1))).clamp(min=self.limit[0]))


def own_task(make, planned, data):
    return Task(model=make, data=data)


def begun(places, make, codec):
    """An experiment with a model of our own, its task, a service that serves it and its devices."""
    content = CONTENT | {"partition": {"kind": "iid", "clients": 6}, "name": "own"}
    content["algorithm"] = {"client_lr": 0.1, "batch_size": 25, "server": {"name": "adam"}}
    content["algorithm"]["server"]["server_lr"] = 0.05
    content["run"] = {"rounds": 3, "cohort": 0.5, "seed": 7, "codec": codec}
    experiment = check_experiment(content, "test")
    task = Task(model=make, data=build_data(experiment))
    weights = task.initial_weights(7)
    spec = roles(task)
    service = Service.open(*places(), build=build_algorithm, clock=Clock())
    settings = RoundSettings.sampled(experiment)
    run = service.create_run(experiment, spec.pack(weights), spec.packed(), settings)
    tokens = [issue_tokens(service, run, actor="test")[0] for _ in range(6)]
    devices = [enrol(service, t, bytes([i]) * 32).id for i, t in enumerate(tokens)]
    return experiment, task, spec, service, run, devices


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_served_run_with_statistics_is_the_simulated_one(places, codec):
    experiment, task, spec, service, run, devices = begun(places, Net, codec)
    settings = {"cohort": 0.5, "num_rounds": 3, "seed": 7, "codec": codec}
    simulated = list(rounds(build_algorithm(experiment), task, **settings))
    plan, packed = plan_of(experiment, task.data, ()), spec.packed()
    trainers = [
        TorchTrainer(lambda _, k=k: one_client(task.data, k), build=partial(own_task, Net))
        for k in range(6)
    ]
    residuals = {}
    sent = []
    for number in range(1, 4):
        service.tick()
        for device in devices:
            work = check_in(service, device)
            if isinstance(work, Wait):
                continue
            received = np.frombuffer(b"".join(read_version(service, run, work.version)), "<f4")
            place = {"seed": work.seed, "round": work.number, "client": work.client}
            update = trainers[work.client].train(
                plan, packed, received, **place, check=lambda: None
            )
            encoded = encode_update(
                update.delta,
                codec,
                residuals.get(work.client),
                **place,
                num_statistics=packed.dim - packed.num_parameters,
            )
            residuals[work.client] = encoded.residual
            said = claims(
                update.delta,
                weight=update.weight,
                loss=update.loss,
                sha256=hashlib.sha256(encoded.body).hexdigest(),
                codec=codec,
                length_bytes=len(encoded.body),
            )
            upload = begin(service, device, work.assignment, said, codec)
            append_chunk(service, device, upload.upload, 0, encoded.body)
            finish_report(service, device, upload.upload)
            sent.append(len(encoded.body))
        service.tick()
        weights = np.frombuffer(b"".join(read_version(service, run, number)), "<f4")
        np.testing.assert_allclose(
            weights, spec.pack(simulated[number].weights), rtol=1e-6, atol=1e-6
        )
    assert sum(sent) == sum(round.uplink_bytes for round in simulated)
    variances = packed.unflatten(weights)["norm.running_var"]
    assert variances.min() > 0.0
    metrics = trainers[0].evaluate(plan, packed, weights, check=lambda: None)
    assert math.isfinite(metrics["loss"][0])
    service.close()


def test_a_device_names_a_constant_that_its_training_changed(places):
    make = partial(Net, writes_late=True)
    experiment, task, spec, service, _, _ = begun(places, make, "float32")
    trainer = TorchTrainer(lambda _: one_client(task.data, 0), build=partial(own_task, make))
    plan = plan_of(experiment, task.data, ())
    received = spec.pack(task.initial_weights(7))
    with pytest.raises(ConfigError, match="limit must stay what it is"):
        trainer.train(plan, spec.packed(), received, seed=7, round=1, client=0, check=lambda: None)
    service.close()
