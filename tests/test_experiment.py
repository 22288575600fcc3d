"""Experiment files: strict, and helpful where they are wrong."""

from pathlib import Path

import pytest

from potluck.core import ConfigError
from potluck.experiment import load_experiment
from potluck.simulation import build_algorithm, build_data, build_task
from potluck.tasks import PerStep

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.toml"))

GOOD = """
name = "good"
[task]
data = "digits"
model = "2nn"
[partition]
kind = "iid"
clients = 10
[algorithm]
client_lr = 0.1
batch_size = "full"
[run]
rounds = 3
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "experiment.toml"
        path.write_text(text)
        return path

    return write


def test_a_good_file_is_read(written):
    experiment = load_experiment(written(GOOD), ["run.rounds=5", "task.model=logistic"])
    assert experiment.run.rounds == 5
    assert experiment.task.model == "logistic"
    assert build_algorithm(experiment).batch_size is None
    assert build_data(experiment).num_clients == 10


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_of_the_repository_is_valid(path):
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    build_algorithm(experiment)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.round=5", "unknown key run.round: did you mean run.rounds?"),
        ("algorithm.lr=5", "unknown key algorithm.lr: did you mean algorithm.client_lr?"),
        ("colour=5", "unknown key colour: remove it. Known here: algorithm, name"),
        ("run.rounds=0", "run.rounds must be at least 1, got run.rounds = 0."),
        ("run.rounds=1.5", "run.rounds must be an integer, got run.rounds = 1.5."),
        ("run.rounds=many", "run.rounds must be an integer, got run.rounds = 'many'."),
        ("run.cohort=1.5", "run.cohort must be an integer or at most 1.0, got run.cohort = 1.5."),
        ("run.cohort=-1", "at least 1"),
        ("task.model=3nn", "task.model must be one of '2nn', 'cnn', 'logistic', 'char-l"),
        ("algorithm.client_lr=0.0", "algorithm.client_lr must be above 0"),
        ("algorithm.batch_size=none", "algorithm.batch_size must be an integer or one of 'full'"),
        ("name='a b'", "name must be letters"),
        ("run=3", "run must be a table"),
        ("run.skip_failures=1", "run.skip_failures must be true or false"),
        ("rounds", "an override must look like run.rounds=20, got 'rounds'"),
        ("name.x=1", "name must be a table"),
        ("algorithm.server.name=adam", "algorithm.server.name must be one of 'average'"),
    ],
)
def test_what_is_wrong_is_named(written, override, message):
    with pytest.raises(ConfigError) as caught:
        load_experiment(written(GOOD), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(written):
    with pytest.raises(ConfigError, match=r"algorithm\.client_lr is missing"):
        load_experiment(written(GOOD.replace("client_lr = 0.1", "")))


def test_every_mistake_is_named_at_once(written):
    with pytest.raises(ConfigError, match=r"run\.rounds must .* unknown key run\.x"):
        load_experiment(written(GOOD), ["run.rounds=0", "run.x=1"])


def test_a_file_that_is_missing_or_no_toml_is_named(written, tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_experiment(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_experiment(written("name = "))


def test_fedsgd_is_one_full_batch_step(written):
    algorithm = build_algorithm(load_experiment(written(GOOD), ["algorithm.name=fedsgd"]))
    assert (algorithm.local_epochs, algorithm.batch_size) == (1, None)
    with pytest.raises(ConfigError, match="fedsgd"):
        build_algorithm(
            load_experiment(written(GOOD), ["algorithm.name=fedsgd", "algorithm.local_epochs=5"])
        )


def test_data_that_come_divided_need_the_own_partition(written):
    with pytest.raises(ConfigError, match=r"task\.path must be given"):
        load_experiment(written(GOOD), ["task.data=folder"])
    with pytest.raises(ConfigError, match=r"partition\.kind must be 'own'"):
        build_data(load_experiment(written(GOOD), ["task.data=folder", "task.path=x"]))


@pytest.mark.parametrize(
    ("data", "kind", "kinds"),
    [
        ("digits", "own", "'iid', 'shards', 'dirichlet' or 'unbalanced'"),
        ("digits", "writer", "'iid', 'shards', 'dirichlet' or 'unbalanced'"),
        ("mnist", "user", "'iid', 'shards', 'dirichlet', 'unbalanced' or 'writer'"),
        ("wisdm", "writer", "'iid', 'shards', 'dirichlet', 'unbalanced' or 'user'"),
        ("shakespeare", "module", "'iid', 'unbalanced' or 'role'"),
        ("shakespeare", "shards", "'iid', 'unbalanced' or 'role'"),
        ("pythonlib", "role", "'iid', 'unbalanced' or 'module'"),
        ("pythonlib", "dirichlet", "'iid', 'unbalanced' or 'module'"),
    ],
)
def test_a_partition_that_does_not_fit_the_data_is_refused(written, data, kind, kinds):
    experiment = load_experiment(written(GOOD), [f"task.data={data}", f"partition.kind={kind}"])
    with pytest.raises(ConfigError) as caught:
        build_data(experiment)
    assert str(caught.value) == (
        f"partition.kind must be {kinds} with task.data = '{data}', got partition.kind = '{kind}'. "
        "Change one of the two."
    )


def test_a_variant_is_of_shakespeare_only(written):
    for variant in ("paper", "clean"):
        with pytest.raises(ConfigError, match=r"task\.variant must be left out .*= 'digits'\. Rem"):
            build_data(load_experiment(written(GOOD), [f"task.variant={variant}"]))
    with pytest.raises(ConfigError, match=r"task\.variant must be one of 'clean', 'paper', got"):
        load_experiment(written(GOOD), ["task.data=shakespeare", "task.variant=dirty"])


def test_the_standard_library_by_module_and_iid(written):
    overrides = ["task.data=pythonlib", "partition.kind=module"]
    data = build_data(load_experiment(written(GOOD), overrides))
    assert "json" in data.clients
    assert data.test_offsets is not None
    iid = build_data(load_experiment(written(GOOD), ["task.data=pythonlib"]))
    assert iid.num_clients == 10
    assert iid.train.num_examples == data.train.num_examples


@pytest.mark.parametrize(
    ("more", "clients", "characters"),
    [([], 1_144, 3_566_303), (["task.variant=paper"], 1_146, 3_570_710)],
)
def test_shakespeare_by_role_in_both_variants(written, published, more, clients, characters):
    published("shakespeare")
    overrides = ["task.data=shakespeare", "partition.kind=role", *more]
    data = build_data(load_experiment(written(GOOD), overrides))
    assert data.num_clients == clients
    assert (data.train.targets != data.padding).sum() == characters


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.data=pythonlib"], r"with text .*got task\.model = '2nn' with"),
        (["task.model=char-lstm"], r"with text .*got task\.model = 'char-lstm'"),
    ],
)
def test_text_and_models_of_sequences_belong_together(written, overrides, message):
    experiment = load_experiment(written(GOOD), overrides)
    with pytest.raises(ConfigError, match=message):
        build_task(experiment, build_data(experiment))


def test_keys_of_language_models_are_refused_elsewhere(written):
    for override in ("task.hidden=16", "task.loss=per-step", "task.batches=random"):
        with pytest.raises(ConfigError, match=r"must be left out unless task\.model is a language"):
            build_data(load_experiment(written(GOOD), [override]))


def test_a_language_model_is_built_as_it_is_described(written):
    overrides = ["task.data=pythonlib", "partition.kind=module", "task.model=char-lstm-peephole"]
    overrides += ["task.loss=per-step", "task.batches=random", "task.hidden=16"]
    experiment = load_experiment(written(GOOD), overrides)
    task = build_task(experiment, build_data(experiment))
    assert task.loss == PerStep(padding=257)
    assert task.batches == "random"
    assert task.module().lstm1.peepholes.shape == (3, 16)
