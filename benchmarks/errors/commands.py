"""Mistakes at the command line and in experiment files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from watched import Mistakes, potluck

mistakes = Mistakes("command line")
settings = Mistakes("experiment file")

EXPERIMENT = """name = "digits"

[task]
data = "digits"
model = "2nn"

[partition]
kind = "iid"
clients = 5

[algorithm]
client_lr = 0.1
batch_size = 50

[run]
rounds = 1
cohort = 2
executor = "loop"
"""


def experiment(folder: Path, text: str = EXPERIMENT, name: str = "exp.toml") -> Path:
    """Write an experiment file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def train(folder: Path, *words: str, text: str = EXPERIMENT) -> None:
    """Train it, with options."""
    potluck("train", experiment(folder, text), "--out", folder / "runs", *words)


def _words(*words: str) -> Callable[[Path], None]:
    return lambda folder: potluck(*(word.replace("DIR", str(folder)) for word in words))


for _what, _line in {
    "an unknown command": "trian exp.toml",
    "no command's argument": "train",
    "an unknown option": "train exp.toml --epochs 3",
    "an option without its value": "train exp.toml --set",
    "a count that is a word": "train exp.toml --seeds three",
    "a count of 0": "train exp.toml --seeds 0",
    "an experiment that is not there": "train DIR/none.toml",
    "an experiment that is a folder": "train DIR",
    "a report of a folder that is not there": "report DIR/none",
    "a report of a folder without runs": "report DIR",
    "a report by an axis that there is not": "report DIR --x days",
    "reproduce something that is not in the paper": "reproduce table9",
    "reproduce with seeds that are words": "reproduce table4 --seeds a,b",
    "reproduce an unknown cell": "reproduce table4 --quick --cells none-* --runs DIR --out DIR/o",
    "reproduce with an even number of rates": "reproduce table4 --rates 2",
    "reproduce from a folder without experiments": "reproduce table4 --experiments DIR",
    "get data that do not exist": "data get cifar10",
    "describe without a file": "data describe",
    "describe a file that is not there": "data describe DIR/none.toml",
    "init into a folder that is not there": "init DIR/none/exp.toml",
    "init into a folder": "init DIR --force",
    "a demo with one device": "demo serve --devices 1",
    "a demo into a path that is a file": "demo serve --experiment DIR/none.toml",
    "status without a server": "status --home DIR/none",
    "devices without a server": "devices --home DIR/none",
    "enroll without a server": "enroll --wait 0 --home DIR/none",
    "enroll none": "enroll --count 0 --home DIR/none",
    "a dashboard without a server": "dashboard --home DIR/none",
    "pause without a server": "pause --home DIR/none",
    "resume without a server": "resume --home DIR/none",
    "revoke without a server": "revoke abcdef --home DIR/none",
    "audit without a server": "audit --home DIR/none",
    "metrics without a server": "metrics --home DIR/none",
}.items():
    mistakes.add(_what, _words(*_line.split()))


@mistakes("init over a file that is there")
def _(folder: Path) -> None:
    potluck("init", experiment(folder))


@mistakes("a report written into a folder that is a file")
def _(folder: Path) -> None:
    train(folder)
    (folder / "file").write_text("")
    potluck("report", folder / "runs", "--out", folder / "file" / "report")


@mistakes("a report of a metric that the run has not")
def _(folder: Path) -> None:
    train(folder)
    potluck("report", folder / "runs", "--metric", "f1")


@mistakes("runs into a path that is a file")
def _(folder: Path) -> None:
    (folder / "runs").write_text("")
    train(folder)


@mistakes("another experiment under the name of a run")
def _(folder: Path) -> None:
    train(folder)
    train(folder, "--set", "algorithm.client_lr=0.2")


@mistakes("a run whose lines were edited")
def _(folder: Path) -> None:
    train(folder)
    (lines,) = (folder / "runs").rglob("rounds.jsonl")
    lines.write_text("{not json}\n")
    train(folder, "--set", "run.rounds=2")


@mistakes("a run whose checkpoint was damaged")
def _(folder: Path) -> None:
    train(folder)
    for file in (folder / "runs").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    train(folder, "--set", "run.rounds=2")


@mistakes("a report of a run whose manifest is not JSON")
def _(folder: Path) -> None:
    train(folder)
    (manifest,) = (folder / "runs").rglob("manifest.json")
    manifest.write_text("")
    potluck("report", folder / "runs")


@mistakes("a picture of a kind that cannot be drawn")
def _(folder: Path) -> None:
    potluck("data", "describe", experiment(folder), "--out", folder / "picture.xyz")


@mistakes("export of a folder that is no run")
def _(folder: Path) -> None:
    potluck("export", folder / "model.safetensors", "--home", folder)


for _what, _override in {
    "an unknown key": "run.round=3",
    "an unknown section": "runs.rounds=3",
    "an override without =": "run.rounds",
    "an override of a section": "run=3",
    "an override that is no TOML": "run.rounds=[",
    "rounds that are a word": "run.rounds='ten'",
    "no rounds": "run.rounds=0",
    "half a round": "run.rounds=1.5",
    "a negative seed": "run.seed=-1",
    "a cohort above everyone": "run.cohort=50",
    "a cohort above 1": "run.cohort=1.5",
    "a target below 0": "run.target=-0.5",
    "a target of a metric that there is not": "run.target={metric='f1',at_least=0.5}",
    "an executor that there is not": "run.executor='gpu'",
    "a device that there is not": "run.device='tpu'",
    "a GPU with an executor without one": "run.device='cuda'",
    "tf32 without a GPU": "run.precision='tf32'",
    "half precision": "run.precision='fp16'",
    "no workers": "run.workers=0",
    "a codec that there is not": "run.codec='int2'",
    "evaluation never": "run.evaluate_every=0",
    "a rate of 0": "algorithm.client_lr=0.0",
    "a rate that is text": "algorithm.client_lr='0.1'",
    "a rate that is infinite": "algorithm.client_lr=inf",
    "a rate that is no number": "algorithm.client_lr=nan",
    "an algorithm that there is not": "algorithm.name='fedadam'",
    "FedProx without its μ": "algorithm.name='fedprox'",
    "μ with FedAvg": "algorithm.mu=0.1",
    "no epochs": "algorithm.local_epochs=0",
    "empty batches": "algorithm.batch_size=0",
    "a batch size that is a word": "algorithm.batch_size='all'",
    "a clip of 0": "algorithm.gradient_clip=0.0",
    "a server optimizer that there is not": "algorithm.server={name='sgd'}",
    "FedAdam without its rate": "algorithm.server={name='adam'}",
    "a momentum of 1": "algorithm.server={name='momentum',momentum=1.0}",
    "a schedule that there is not": "algorithm.client_schedule={name='plateau'}",
    "a schedule without its rounds": "algorithm.client_schedule={name='cosine'}",
    "a model that there is not": "task.model='resnet'",
    "a data set that there is not": "task.data='cifar10'",
    "images to a language model": "task.model='char-lstm'",
    "a variant of a data set that has none": "task.variant='paper'",
    "a width of a model that has none": "task.hidden=100",
    "a folder for a data set that has none": "task.path='data'",
    "a partition that there is not": "partition.kind='random'",
    "writers of data without writers": "partition.kind='writer'",
    "no clients": "partition.clients=0",
    "more clients than examples": "partition.clients=100000",
    "an alpha of 0": "partition.alpha=0",
    "own clients of a data set": "partition.kind='own'",
    "a profile that there is not": "devices={profile='cars'}",
    "a trace that is not there": "devices={trace='none.csv'}",
    "a profile and a trace": "devices={profile='phones',trace='x.csv'}",
    "neither profile nor trace": "devices={}",
    "a name with a slash": "name='a/b'",
    "an empty name": "name=''",
    "a setting of a server that there is not": "server.rounds=3",
}.items():
    settings.add(_what, lambda folder, override=_override: train(folder, "--set", override))


for _what, _text in {
    "an empty file": "",
    "a file that is no TOML": "name: digits\n",
    "a key twice": EXPERIMENT + "rounds = 2\n",
    "a section twice": EXPERIMENT + "\n[run]\nrounds = 2\n",
    "no [algorithm]": EXPERIMENT.replace("[algorithm]\nclient_lr = 0.1\nbatch_size = 50\n", ""),
    "no rate": EXPERIMENT.replace("client_lr = 0.1\n", ""),
    "quotes of a word processor": EXPERIMENT.replace('"digits"', "“digits”"),
}.items():
    settings.add(_what, lambda folder, text=_text: train(folder, text=text))


@settings("a file that is no text")
def _(folder: Path) -> None:
    (folder / "exp.toml").write_bytes(bytes(range(256)))
    potluck("train", folder / "exp.toml", "--out", folder / "runs")
