"""Updates that travel in a codec: by hand, telescoping, on every executor, refused when unknown."""

import math

import numpy as np
import pytest

from potluck import FedAvg, Scaffold, Task, TwoNN, datasets, partitions, rounds
from potluck.algorithms import ClientHalf
from potluck.config.experiment import check_experiment
from potluck.core import (
    ClientContext,
    ConfigError,
    DivergedError,
    Update,
    decode_vector,
    encode_update,
    encoded_bytes,
    stream,
)
from potluck.core.codecs import CODECS
from potluck.simulation.compression import compressed
from slope import slope_task

LOSSY = ("bfloat16", "int8", "int4")
CONTENT = {
    "name": "x",
    "task": {"data": "digits", "model": "2nn"},
    "partition": {"kind": "iid"},
    "algorithm": {"client_lr": 0.1},
    "run": {"rounds": 3},
}


class Fixed:
    """An algorithm whose every update is one vector."""

    vectors = 1
    client_vectors = 0

    def __init__(self, delta):
        self.delta = np.array(delta, np.float32)

    def client_update(self, received, client):
        assert client.state is None
        yield from ()
        return Update(self.delta.copy(), float(client.num_examples), 0.5, 1)


def update(algorithm, state=None, *, seed=0, round=1, client=0):
    received = np.zeros(len(algorithm.algorithm.delta), np.float32)
    return ClientHalf(algorithm, received, ClientContext(seed, round, client, 5, state)).update


@pytest.fixture(scope="module")
def task():
    data = partitions.shards(datasets.digits(), clients=10, seed=0)
    return Task(model=lambda: TwoNN((1, 8, 8)), data=data)


def history(algorithm, task, codec, executor="loop", **kwargs):
    kwargs = {"cohort": 0.4, "num_rounds": 5, "seed": 1} | kwargs
    return list(rounds(algorithm, task, codec=codec, executor=executor, **kwargs))


def states(round):
    return round.weights.tobytes(), {k: v.tobytes() for k, v in round.client_states.items()}


def test_three_numbers_by_hand():
    # int4: the scale is 7/7 = 1, so 7 is sent as it is, 2.25 as 2 or 3 and −0.5 as −1 or 0:
    # ⌊x + u⌋ with the client's own u of the round.
    algorithm = compressed(Fixed([7.0, 2.25, -0.5]), "int4")
    u = stream(3, "rounding", 9, 4).random((1, 3), np.float32)[0]
    sent = update(algorithm, seed=3, round=9, client=4)
    expected = [7.0, 3.0 if u[1] >= 0.75 else 2.0, 0.0 if u[2] >= 0.5 else -1.0]
    assert sent.delta.tolist() == expected
    assert sent.state.tolist() == [0.0, 2.25 - expected[1], -0.5 - expected[2]]
    assert sent.weight == 5.0
    # What was lost is in the next update: 7, 2.25 and −0.5 more than the residual.
    again = update(algorithm, sent.state, seed=3, round=10, client=4)
    wanted = np.array([7.0, 2.25, -0.5]) + sent.state
    np.testing.assert_allclose(again.delta + again.state, wanted, atol=1e-6)


@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_averaged_is_unbiased_and_biased_rounding_would_show(codec):
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    algorithm = compressed(Fixed(values), codec)
    num = 2000
    sent = np.stack([update(algorithm, round=t).delta for t in range(num)]).astype(np.float64)
    deviation = sent.std(axis=0) / math.sqrt(num)
    moved = deviation > 0
    assert moved.mean() > 0.8
    scores = (sent.mean(axis=0) - values)[moved] / deviation[moved]
    assert np.abs(scores).max() < 5
    down = (sent.min(axis=0) - values)[moved] / deviation[moved]  # always rounded down
    assert np.median(np.abs(down)) > 15


@pytest.mark.parametrize("codec", LOSSY)
def test_over_rounds_nothing_is_lost_but_the_last_residual(codec):
    values = np.random.default_rng(1).normal(size=1030).astype(np.float32)
    algorithm = compressed(Fixed(values), codec)
    kept, total = None, np.zeros(1030)
    for t in range(1, 41):
        sent = update(algorithm, kept, round=t)
        kept = sent.state
        total += sent.delta
    np.testing.assert_allclose(total + kept, 40 * values, atol=1e-4)
    assert np.abs(kept).max() < 1.5 * np.abs(values).max()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("kind", [FedAvg, Scaffold])
def test_loop_and_workers_give_the_same_bits(kind, codec, task):
    algorithm = kind(client_lr=0.1, local_epochs=2)
    loop, workers = (history(algorithm, task, codec, e) for e in ("loop", "workers"))
    for one, other in zip(loop, workers, strict=True):
        assert states(one) == states(other)
    plain = history(algorithm, task, "float32")[-1]
    assert plain.weights.tobytes() != loop[-1].weights.tobytes()
    assert loop[-1].metrics["loss"] < loop[0].metrics["loss"]


@pytest.mark.parametrize("kind", [FedAvg, Scaffold])
def test_resuming_from_any_round_changes_nothing(kind, task):
    algorithm = kind(client_lr=0.1)
    whole = history(algorithm, task, "int4")
    for earlier in whole[1:-1]:
        resume = (earlier.number, earlier.state, earlier.client_states)
        assert states(history(algorithm, task, "int4", resume=resume)[-1]) == states(whole[-1])
    with pytest.raises(ValueError, match="what a codec lost"):
        rounds(algorithm, task, codec="int4", resume=(1, whole[1].state))


def test_one_client_moves_the_model_by_what_was_decoded(task):
    plain = history(FedAvg(client_lr=0.1), task, "float32", cohort=1, num_rounds=1)
    short = history(FedAvg(client_lr=0.1), task, "int8", cohort=1, num_rounds=1)
    (client,) = short[1].cohort
    delta = plain[1].weights - plain[0].weights
    encoded = encode_update(delta, "int8", None, seed=1, round=1, client=int(client))
    decoded = decode_vector(encoded.body, "int8", len(delta))
    scale = np.abs(delta).max() / 127  # the mean is rounded once more; a step may fall otherwise
    moved = short[1].weights - short[0].weights
    assert np.mean(np.abs(moved - decoded) < 0.01 * scale) > 0.95
    assert np.mean(np.abs(moved - delta) < 0.01 * scale) < 0.5


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_those_of_the_codec(codec, task):
    fedavg = history(FedAvg(client_lr=0.1), task, codec, num_rounds=1)[1]
    dim = len(fedavg.weights)
    assert fedavg.uplink_bytes == 4 * encoded_bytes(codec, dim)
    assert fedavg.downlink_bytes == 4 * 4 * dim
    scaffold = history(Scaffold(client_lr=0.1), task, codec, num_rounds=1)[1]
    assert scaffold.uplink_bytes == 4 * encoded_bytes(codec, 2 * dim)


@pytest.mark.parametrize("executor", ["loop", "workers"])
def test_a_client_that_fails_keeps_its_residual(executor):
    task = slope_task([(1, 2)], [(1, 1e30)], [(1, -4)])
    algorithm = FedAvg(client_lr=0.1)
    one = history(algorithm, task, "int4", executor, cohort=1.0, num_rounds=1, skip_failures=True)
    assert [failure.client for failure in one[1].failures] == [1]
    assert set(one[1].client_states) == {0, 2}
    with pytest.raises(DivergedError, match=r"client '1'.*finite"):
        history(algorithm, task, "int4", executor, cohort=1.0, num_rounds=1)


def test_an_unknown_codec_is_refused_with_the_nearest(task):
    with pytest.raises(ValueError, match=r"got codec='int9'\. Did you mean 'int"):
        rounds(FedAvg(client_lr=0.1), task, codec="int9")
    for wrong, near in (("bf16", "bfloat16"), ("float16", "bfloat16"), ("Int8", "int8")):
        content = CONTENT | {"run": {"rounds": 3, "codec": wrong}}
        with pytest.raises(ConfigError, match=rf"run\.codec must be .* Did you mean '{near}'"):
            check_experiment(content, "test")
    with pytest.raises(ConfigError, match=r"unknown key server\.codec"):
        check_experiment(CONTENT | {"server": {"codec": "int8"}}, "test")
