"""Vectors, seeds, cohorts and the streaming mean."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.core import (
    DivergedError,
    FixedPointMean,
    Poisson,
    Spec,
    derive_seed,
    higher_is_better,
    sample_cohort,
    stream,
)
from potluck.core.cohorts import cohort_size

SPEC = Spec(("a", "b", "c"), ((2, 3), (), (4,)))


def test_a_spec_knows_where_everything_lies():
    assert SPEC.sizes == (6, 1, 4)
    assert SPEC.offsets == (0, 6, 7, 11)
    assert SPEC.dim == 11
    assert SPEC.num_bytes == 44


def test_unflatten_shares_memory_with_the_vector():
    vector = np.arange(11, dtype=np.float32)
    tensors = SPEC.unflatten(vector)
    assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    tensors["c"][0] = -1.0
    assert vector[7] == -1.0
    as_torch = SPEC.unflatten(torch.from_numpy(vector))
    as_torch["b"].fill_(9.0)
    assert vector[6] == 9.0


def test_unflatten_takes_a_matrix_of_models():
    cohort = np.arange(22, dtype=np.float32).reshape(2, 11)
    assert SPEC.unflatten(cohort)["a"].shape == (2, 2, 3)


@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=5), st.data())
def test_flatten_inverts_unflatten(shapes, data):
    spec = Spec(tuple(f"t{i}" for i in range(len(shapes))), tuple(tuple(s) for s in shapes))
    vector = stream(data.draw(st.integers(0, 9)), "test").normal(size=spec.dim).astype(np.float32)
    assert np.array_equal(spec.flatten(spec.unflatten(vector)), vector)


def test_flatten_refuses_foreign_names_and_shapes():
    with pytest.raises(ValueError, match="exactly the names"):
        SPEC.flatten({"a": np.zeros((2, 3))})
    wrong = {"a": np.zeros((3, 2)), "b": np.zeros(()), "c": np.zeros(4)}
    with pytest.raises(ValueError, match=r"a must have shape \(2, 3\), got shape=\(3, 2\)"):
        SPEC.flatten(wrong)
    with pytest.raises(ValueError, match="length 11, got length=10"):
        SPEC.unflatten(np.zeros(10, np.float32))


def test_streams_depend_on_seed_purpose_round_and_client_and_on_nothing_else():
    base = derive_seed(1, "batches", 2, 3)
    assert base == derive_seed(1, "batches", 2, 3)
    others = {
        derive_seed(0, "batches", 2, 3),
        derive_seed(1, "cohort", 2, 3),
        derive_seed(1, "batches", 3, 2),
        derive_seed(1, "batches", 2, 4),
        derive_seed(1, "batches", 23, 0),
    }
    assert len(others | {base}) == 6
    first = stream(1, "x").random()
    np.random.default_rng().random()
    assert stream(1, "x").random() == first


def test_streams_are_the_same_on_every_machine_and_version():
    assert derive_seed(0, "cohort", 1, 0) == 7219566367586880376
    assert sample_cohort(100, 0.05, seed=0, round=1).tolist() == COHORT


COHORT = [42, 54, 88, 91, 98]


@pytest.mark.parametrize(
    ("population", "cohort", "size"), [(100, 0.1, 10), (100, 0.0, 1), (7, 1.0, 7), (5, 0.5, 2)]
)
def test_a_fraction_is_max_of_c_times_k_and_one(population, cohort, size):
    clients = sample_cohort(population, cohort, seed=0, round=1)
    assert len(clients) == size
    assert len(set(clients.tolist())) == size
    assert clients.min() >= 0
    assert clients.max() < population


def test_every_client_is_sampled_equally_often():
    counts = np.zeros(20)
    for round in range(2000):
        counts[sample_cohort(20, 5, seed=3, round=round)] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_a_poisson_cohort_has_a_binomial_size():
    sizes = [len(sample_cohort(100, Poisson(0.1), seed=0, round=r)) for r in range(2000)]
    assert abs(np.mean(sizes) - 10) < 5 * 3 / np.sqrt(2000)
    assert 8 < np.var(sizes) < 10  # 100 · 0.1 · 0.9 = 9; a fixed size would have 0


@pytest.mark.parametrize(
    ("cohort", "message"),
    [
        (1.5, r"fraction from 0.0 to 1.0, got cohort=1.5"),
        (-0.1, r"fraction from 0.0 to 1.0, got cohort=-0.1"),
        (1200, r"at most the population \(1000\), got cohort=1200"),
        (0, r"at least 1 when it is a count, got cohort=0"),
    ],
)
def test_a_cohort_that_cannot_be_is_refused(cohort, message):
    with pytest.raises(ValueError, match=message):
        cohort_size(1000, cohort)


def test_a_cohort_is_no_boolean():
    with pytest.raises(TypeError, match="cohort=True"):
        cohort_size(10, True)
    with pytest.raises(ValueError, match="rate=0"):
        Poisson(0)


def test_the_weighted_mean_of_three_numbers():
    mean = FixedPointMean(1)
    for value, weight in ((1.0, 1.0), (2.0, 2.0), (4.0, 5.0)):
        mean.add(np.array([value], np.float32), weight)
    assert mean.mean().tolist() == [25.0 / 8.0]  # (1 + 4 + 20) / (1 + 2 + 5)
    assert mean.total == 8.0


def test_the_mean_of_nothing_is_zero():
    assert FixedPointMean(3).mean().tolist() == [0.0, 0.0, 0.0]


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 4))
def test_any_order_and_any_grouping_give_the_same_bits(seed, cohort, groups):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(cohort, 17)).astype(np.float32)
    weights = random.integers(1, 700, cohort).astype(float)
    whole = FixedPointMean(17)
    for vector, weight in zip(vectors, weights, strict=True):
        whole.add(vector, weight)
    partial = [FixedPointMean(17) for _ in range(groups)]
    for i in random.permutation(cohort):
        partial[random.integers(groups)].add(vectors[i], weights[i])
    merged = FixedPointMean(17)
    for part in partial:
        merged.merge(part)
    assert merged.mean().tobytes() == whole.mean().tobytes()
    first, *others = (FixedPointMean.of(part.sum, part.total, part.bound) for part in partial)
    for other in others:
        first.merge(other)  # where the first one's sum lies
    first.add(vectors[0], 1.0)
    whole.add(vectors[0], 1.0)
    assert first.mean().tobytes() == whole.mean().tobytes()
    assert first.sum is partial[0].sum
    weights[0] += 1.0
    exact = np.average(vectors.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(whole.mean(), exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e4, 1e7])
def test_entries_are_rounded_to_the_nearest_even_multiple_whatever_their_size(scale):
    random = np.random.default_rng(0)
    mean, expected = FixedPointMean(40_000), np.zeros(40_000, np.int64)
    for weight in (1.0, 60.0, 7.0):
        vector = (scale * random.normal(size=40_000)).astype(np.float32)
        vector[:4] = np.array([0.5, 1.5, -0.5, -2.5]) * 2.0**-30  # halfway at weight 1
        mean.add(vector, weight)
        expected += np.rint(vector.astype(np.float64) * (weight * 2.0**30)).astype(np.int64)
    assert (mean.sum == expected).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_sum_refuses_what_it_cannot_hold_and_stays_as_it_was(value):
    mean = FixedPointMean(2)
    mean.add(np.array([1.0, 2.0], np.float32), 3.0)
    with pytest.raises(DivergedError, match="finite and small enough"):
        mean.add(np.array([1.0, value], np.float32), 1.0)
    assert mean.mean().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf])
def test_a_weight_is_positive_and_finite(weight):
    with pytest.raises(ValueError, match="weight must be positive"):
        FixedPointMean(1).add(np.zeros(1, np.float32), weight)


def test_a_stream_is_pcg64_of_its_derived_seed_every_time():
    seed = derive_seed(3, "batches", 4, 5)
    expected = np.random.Generator(np.random.PCG64(seed)).random(9)
    for _ in range(2):
        np.testing.assert_array_equal(stream(3, "batches", 4, 5).random(9), expected)


@pytest.mark.parametrize("name", ["loss", "train_loss", "mae", "rmse", "wordError", "val-mse"])
def test_losses_and_errors_are_better_the_smaller_they_are(name):
    assert not higher_is_better(name)


@pytest.mark.parametrize("name", ["accuracy", "r2", "accuracy_after_first", "f1", "lossless"])
def test_other_metrics_are_better_the_larger_they_are(name):
    assert higher_is_better(name)


def test_a_metric_may_say_itself_which_way_it_gets_better():
    def drop(outputs, targets):
        return outputs

    assert higher_is_better("drop", drop)
    drop.higher_is_better = False
    assert not higher_is_better("drop", drop)


def test_what_travels_is_trained_entries_and_then_statistics():
    spec = Spec(
        ("frozen", "encoder", "head", "mean", "mask"),
        ((2,), (1,), (2,), (2,), (1,)),
        ("constant", "statistic", "trained", "statistic", "constant"),
        num_buffers=2,
    )
    vector = np.array([1, 2, 3, 4, 5, 6, 7, -np.inf], np.float32)
    packed = spec.packed()
    assert (spec.num_parameters, spec.size("trained"), spec.size("statistic")) == (5, 2, 3)
    assert packed.names == ("head", "encoder", "mean")
    assert (packed.num_parameters, packed.dim) == (2, 5)
    assert spec.pack(vector).tolist() == [4, 5, 3, 6, 7]
    moved = spec.unpack(2 * spec.pack(vector), vector)
    assert moved.tolist() == [1, 2, 6, 8, 10, 12, 14, -np.inf]
    assert [spec.name_at(entry) for entry in (0, 2, 7)] == ["frozen", "encoder", "mask"]
    assert spec.digest() != Spec(spec.names, spec.shapes).digest()
