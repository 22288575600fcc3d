"""The demonstration: its settings, its table by hand, and, slowly, itself."""

from pathlib import Path

from potluck.core import Target
from potluck.demo import fedsgd_vs_fedavg
from potluck.simulation.runs.report import Cost


def cost(to_target, uplink):
    return Cost(
        name="x",
        seed=1,
        directory=Path("x"),
        identity="x",
        metric="accuracy",
        curve=[(0, 0.1), (1, 0.5), (100, 0.96)],
        target=Target.of(0.95, "accuracy"),
        to_target=to_target,
        on_grid=to_target,
        held=False,
        bytes_to_target=None if to_target is None else (uplink, uplink),
        bytes=(uplink, uplink),
        best=0.96,
        best_round=100,
        final=0.96,
        rounds=100,
        seconds=1.0,
        is_finished=True,
    )


def test_only_the_algorithm_differs_between_what_is_compared():
    for setting in fedsgd_vs_fedavg.settings():
        experiment = setting.experiment.model_dump()
        assert experiment.pop("algorithm")["name"] == setting.algorithm.lower()
        experiment.pop("name")
        same = [
            s.experiment.model_dump()
            for s in fedsgd_vs_fedavg.settings()
            if s.partition == setting.partition
        ]
        for other in same:
            del other["algorithm"], other["name"]
            assert other == experiment


def test_the_rates_are_the_ones_that_were_tuned():
    import json

    rates = json.loads((Path(__file__).parents[2] / "benchmarks/demo/rates.json").read_text())
    for setting in fedsgd_vs_fedavg.settings():
        algorithm = setting.experiment.algorithm
        tuned = rates[f"{setting.partition} {setting.algorithm.lower()}"]
        assert algorithm.client_lr == tuned["best"]


def test_the_table_by_hand(tmp_path):
    results = {
        ("iid", "FedSGD"): [cost(80.0, 800), cost(100.0, 1000)],
        ("iid", "FedAvg"): [cost(8.0, 80), cost(10.0, 100)],
        ("two-shard", "FedSGD"): [cost(90.0, 900)],
        ("two-shard", "FedAvg"): [cost(30.0, 300), cost(None, 0)],
    }
    rows = fedsgd_vs_fedavg.table(results)
    assert [row[3:] for row in rows] == [
        ("90.0", "900 B", "1.0×"),
        ("9.0", "90 B", "10.0×"),
        ("90.0", "900 B", "1.0×"),
        ("–", "–", ""),
    ]
    fedsgd_vs_fedavg.draw(results, [tmp_path / "demo.png"])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
