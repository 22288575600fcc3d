"""Experiment files: strict, and helpful where they are wrong."""

import pickle
import re
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from potluck import (
    Adagrad,
    Adam,
    Average,
    FedAvg,
    FedProx,
    Momentum,
    Nesterov,
    Scaffold,
    Yogi,
    fed_sgd,
    schedules,
)
from potluck.config.experiment import TaskSection, check_experiment, load_experiment
from potluck.core import ConfigError
from potluck.models import PerStep
from potluck.simulation import build_algorithm, build_data, build_task

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))

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
OWNERS = GOOD.replace("clients = 10\n", "")  # the natural owners are as many as they are


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "experiment.toml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device=gpu"], r"run.device must be 'cpu', .* got run.device = 'gpu'"),
        (["device=cuda"], r"left out with run.executor = 'workers', .* Use run.executor = 'vmap'"),
        (["executor=auto", "precision=bf16"], r"not be 'bf16' with this executor and no GPU that"),
        (["executor=vmap", "precision=bf16"], r"Use run.executor = 'workers', or run.device"),
        (["executor=workers", "precision=tf32"], r"must not be 'tf32' without a GPU"),
        (["executor=vmap", "precision=tf32"], r"got run.precision = 'tf32' .*run.device = None"),
        (["executor=ray", "device=cuda:1"], r"must be 'cpu' or 'cuda' with run.executor = 'ray'"),
        (["executor=ray", "ray_gpus=0"], r"run.ray_gpus must be above 0"),
        (["executor=vmap", "precision=half"], r"one of 'float32', 'tf32', 'bf16', got"),
    ],
)
def test_a_device_that_does_not_fit_is_refused(written, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(written(GOOD), [f"run.{override}" for override in overrides])


def test_a_device_is_read(written):
    run = load_experiment(
        written(GOOD), ["run.executor=vmap", "run.device=cuda:1", "run.precision=tf32"]
    ).run
    assert (run.device, run.precision) == ("cuda:1", "tf32")
    assert load_experiment(written(GOOD), ["run.device=cpu"]).run.precision is None
    far = ["run.executor=ray", "run.device=cuda", "run.ray_gpus=0.25", "run.precision=tf32"]
    assert load_experiment(written(GOOD), far).run.ray_gpus == 0.25
    assert load_experiment(written(GOOD), ["run.precision=bf16"]).run.precision == "bf16"


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
        ("colour=5", "unknown key colour: remove it. Known here: algorithm, devices, name"),
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
        (
            "algorithm.server.name=adamw",
            "algorithm.server.name must be one of 'average', 'momentum', 'nesterov', 'adagrad', "
            "'adam', 'yogi', got algorithm.server.name = 'adamw'.",
        ),
        ("algorithm.name=scafold", "algorithm.name must be one of 'fedavg', 'fedsgd', 'fedprox'"),
        (
            "algorithm.mu=0.1",
            "unknown key algorithm.mu with algorithm.name = 'fedavg': remove it, or use "
            "algorithm.name = 'fedprox'. Known here: batch_size, client_lr",
        ),
        ("algorithm.name=fedprox", "algorithm.mu is missing with algorithm.name = 'fedprox'"),
        ("algorithm={name='fedprox',client_lr=1,mu=-1}", "algorithm.mu must be at least 0"),
        (
            "algorithm.server={name='adam',server_lr=1,beta_1=1}",
            "unknown key algorithm.server.beta_1: did you mean "
            "algorithm.server.beta1? Known here: beta1, beta2, name, server_lr, tau.",
        ),
        (
            "algorithm.server.tau=1.0",
            "unknown key algorithm.server.tau with algorithm.server.name = 'average': remove it, "
            "or use algorithm.server.name = 'adagrad' or 'adam' or 'yogi'.",
        ),
        ("algorithm.server.name=yogi", "algorithm.server.server_lr is missing"),
        (
            "algorithm.server=adam",
            "algorithm.server must be a table, got algorithm.server = 'adam'",
        ),
        (
            "algorithm.server={name='momentum',momentum=1.0}",
            "algorithm.server.momentum must be below 1.0 with algorithm.server.name = 'momentum'",
        ),
        ("algorithm.client_schedule={}", "algorithm.client_schedule.name is missing: it must be"),
        ("algorithm.client_schedule={name=3}", "got algorithm.client_schedule.name = 3."),
        (
            "algorithm.client_schedule={name='cosine',round=5}",
            "unknown key algorithm.client_schedule.round: did you mean "
            "algorithm.client_schedule.rounds?",
        ),
        (
            "algorithm.server_schedule={name='warmup',rounds=5,then={name='step',every=0}}",
            "algorithm.server_schedule.then.every must be at least 1 with "
            "algorithm.server_schedule.then.name = 'step', got "
            "algorithm.server_schedule.then.every = 0.",
        ),
        ("algorithm.gradient_clip=0", "algorithm.gradient_clip must be above 0.0"),
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("partition.kind=module", r"clients must be left out unless partition\.kind is 'iid', 'sh"),
        (
            "partition.alpha=0.1",
            r"got partition\.alpha = 0\.1 with partition\.kind = 'iid'",
        ),
        ("partition.shards_per_client=3", r"unless partition\.kind is 'shards', got"),
        (
            "task.scale=standard",
            r"task\.scale must be left out unless task\.data is 'folder'",
        ),
        ("task.target_column=y", r"got task\.target_column = 'y' with task\.data = 'pythonlib'"),
    ],
)
def test_a_key_that_decides_nothing_is_refused(written, override, message):
    overrides = ["task.data=pythonlib", override]
    with pytest.raises(ConfigError, match=message):
        build_data(load_experiment(written(GOOD), overrides))


def test_an_experiment_goes_to_another_process_as_it_is(written):
    override = (
        "algorithm={name='fedprox',client_lr=1,mu=1,client_schedule={name='linear',rounds=2}}"
    )
    experiment = load_experiment(written(GOOD), [override])
    assert pickle.loads(pickle.dumps(experiment)) == experiment


def test_keys_that_older_manifests_lack_have_no_value_unless_they_are_given():
    """A run that an older version began goes on: what it did not write is None."""
    absent = (None, PydanticUndefined)
    fields = TaskSection.model_fields.items()
    valued = {name for name, field in fields if field.default not in absent}
    assert valued == {"client_column", "target_column"}


def test_an_experiment_of_an_older_manifest_is_built_again(written):
    """It names every key of its time, with the defaults that decide nothing."""
    content = load_experiment(written(GOOD)).model_dump(mode="json")
    for key in ("kind", "missing", "scale", "categories", "split", "test_fraction", "symbols"):
        del content["task"][key]
    assert content["task"]["client_column"] == "client"
    assert build_data(check_experiment(content, "manifest.json")).num_clients == 10


def test_the_standard_library_by_module_and_iid(written):
    overrides = ["task.data=pythonlib", "partition.kind=module"]
    data = build_data(load_experiment(written(OWNERS), overrides))
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
    data = build_data(load_experiment(written(OWNERS), overrides))
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
    experiment = load_experiment(written(OWNERS), overrides)
    task = build_task(experiment, build_data(experiment))
    assert task.loss == PerStep(padding=257, steps=80)
    assert task.batches == "random"
    assert task.module().lstm1.peepholes.shape == (3, 16)


BUILT = [
    ("algorithm.server.name=momentum", Momentum()),
    (
        "algorithm.server={name='nesterov',momentum=0.5,server_lr=2}",
        Nesterov(server_lr=2, momentum=0.5),
    ),
    ("algorithm.server={name='adagrad',server_lr=0.1}", Adagrad(server_lr=0.1)),
    ("algorithm.server={name='adam',server_lr=0.1,tau=0.01}", Adam(server_lr=0.1, tau=0.01)),
    ("algorithm.server={name='yogi',server_lr=0.1,beta2=0.9}", Yogi(server_lr=0.1, beta2=0.9)),
    ("algorithm.server.server_lr=0.5", Average(server_lr=0.5)),
]


@pytest.mark.parametrize(("override", "expected"), BUILT, ids=lambda x: type(x).__name__)
def test_a_server_is_what_its_table_names(written, override, expected):
    assert build_algorithm(load_experiment(written(GOOD), [override])).server == expected


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("{name='constant'}", schedules.Constant()),
        ("{name='exponential',decay=0.9}", schedules.Exponential(0.9)),
        ("{name='step',every=3,factor=0.5}", schedules.Step(3, 0.5)),
        ("{name='linear',rounds=3}", schedules.Linear(3)),
        ("{name='cosine',rounds=3,floor=0.1}", schedules.Cosine(3, 0.1)),
        ("{name='warmup',rounds=3}", schedules.Warmup(3)),
        (
            "{name='warmup',rounds=3,then={name='cosine',rounds=9}}",
            schedules.Warmup(3, then=schedules.Cosine(9)),
        ),
    ],
)
def test_a_schedule_is_what_its_table_names(written, table, expected):
    for side in ("client", "server"):
        experiment = load_experiment(written(GOOD), [f"algorithm.{side}_schedule={table}"])
        assert getattr(build_algorithm(experiment), f"{side}_schedule") == expected


def test_an_algorithm_is_what_its_table_names(written):
    def built(*overrides):
        return build_algorithm(load_experiment(written(GOOD), overrides))

    full = {"client_lr": 0.1, "batch_size": None}
    assert built() == FedAvg(**full)
    assert built("algorithm.gradient_clip=2") == FedAvg(**full, gradient_clip=2)
    assert built("algorithm.name=fedprox", "algorithm.mu=0.5") == FedProx(**full, mu=0.5)
    assert built("algorithm.name=scaffold") == Scaffold(**full)
    assert built("algorithm.name=fedsgd") == fed_sgd(client_lr=0.1)


PAGES = sorted((Path(__file__).parents[2] / "docs" / "algorithms").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tables_that_pages_of_algorithms_show_are_valid(written, page):
    head, rest = GOOD.split("[algorithm]")
    run = rest[rest.index("[run]") :]
    for shown in re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if shown.startswith("[run]"):
            assert load_experiment(written(GOOD.replace("[run]\n", shown)))
            continue
        algorithm = "" if shown.startswith("[algorithm]") else "[algorithm]\nclient_lr = 0.1\n"
        build_algorithm(load_experiment(written(f"{head}{algorithm}{shown}{run}")))
