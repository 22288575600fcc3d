"""Flower's simulation engine: a `ServerApp` with its FedAvg, a `ClientApp`, Ray actors.

As its guide advises for speed: `client_resources` of one core, so that there is an actor a core,
with single-threaded kernels; data are read once by each actor. `run_simulation` starts faster than
`flwr run`, which also starts a SuperLink. No evaluation; the telemetry and the Ray dashboard are
off. The strategy is asked for given cohorts: client k's message names k, whichever node carries it.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import plain
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from notes import Notes
from work import Given, read


@functools.cache
def prepared(folder: str) -> tuple[Given, torch.nn.Module]:
    """Once in each actor: the data, and a module to train."""
    torch.set_num_threads(1)
    given = read(Path(folder))
    return given, plain.model(given.workload.model)


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    given, module = prepared(str(config["folder"]))
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    inputs, targets = given.client(int(config["round"]), int(config["place"]))
    steps = plain.train(
        module, inputs, targets, lr=given.workload.lr, batch_size=given.workload.batch_size,
        trims=bool(config["trims"]),
    )  # fmt: skip
    metrics = MetricRecord({"num-examples": len(inputs), "steps": steps})
    content = {"arrays": ArrayRecord(module.state_dict()), "metrics": metrics}
    return Message(content=RecordDict(content), reply_to=message)


class Strategy(FedAvg):
    """FedAvg with the given cohorts, which notes when rounds end."""

    def __init__(self, notes: Notes) -> None:
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0)
        self.notes, self.examples, self.steps = notes, 0, 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        nodes = list(grid.get_node_ids())
        messages = []
        for place in range(self.notes.given.workload.cohort):
            mine = ConfigRecord({
                "folder": str(self.notes.folder),
                "round": server_round,
                "place": place,
                "trims": "trimmed" in self.notes.variant,
            })  # fmt: skip
            record = RecordDict({"arrays": arrays, "config": mine})
            messages += self._construct_messages(record, [nodes[place]], "train")
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        replies = list(replies)
        done = super().aggregate_train(server_round, replies)
        for reply in replies:
            self.examples += int(reply.content["metrics"]["num-examples"])
            self.steps += int(reply.content["metrics"]["steps"])
        self.notes.round_ended()
        return done


def main() -> None:
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    notes = Notes()
    given = notes.given
    server = ServerApp()

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        module = plain.model(given.workload.model)
        plain.load(module, given.weights)
        while len(list(grid.get_node_ids())) < given.workload.num_clients:
            time.sleep(0.02)
        strategy = Strategy(notes)
        result = strategy.start(
            grid, ArrayRecord(module.state_dict()), num_rounds=given.workload.rounds
        )
        module.load_state_dict(result.arrays.to_torch_state_dict())
        notes.finish(
            np.array(plain.vector(module)), examples=strategy.examples, steps=strategy.steps,
            packages=("flwr", "ray", "torch"),
        )  # fmt: skip

    run_simulation(
        server,
        client,
        num_supernodes=given.workload.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "logging_level": "error", "log_to_driver": False},
        },
    )


if __name__ == "__main__":
    # By its name and not as __main__, so that actors import it instead of unpickling it each time.
    import contender_flower

    contender_flower.main()
