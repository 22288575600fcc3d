"""pfl's simulated backend with its federated averaging, one process a core.

As its guide to fast distributed simulations says: the same script is started once a core, with the
addresses of all in `PFL_WORKER_ADDRESSES`; each process trains its share of a cohort with
single-threaded kernels, and updates are reduced through `torch.distributed`. Tensors are made once
for each client (`PyTorchTensorDataset`). pfl evaluates clients in its first round whatever it is
asked for; the metric here is a constant, so that nothing is computed. Variant "1 process" is one,
with two threads.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))


def supervise(processes: int) -> None:
    """Start the processes; the first of them notes the rounds."""
    addresses = []
    for _ in range(processes):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            addresses.append(f"127.0.0.1:{probe.getsockname()[1]}")
    started = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={
                **os.environ,
                "PFL_WORKER_ADDRESSES": ",".join(addresses),
                "PFL_WORKER_RANK": str(rank),
            },
        )
        for rank in range(processes)
    ]
    raise SystemExit(max(process.wait() for process in started))


def train() -> None:
    import bare
    import plain
    import torch
    from notes import Notes
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    notes = Notes()
    workload = notes.given.workload
    rank = int(os.environ.get("PFL_WORKER_RANK", 0))
    torch.set_num_threads(2 if "1 process" in notes.variant else 1)
    done = {"examples": 0, "steps": 0}
    turns = iter(range(workload.rounds * workload.cohort + 10**6))

    def one(turn: int) -> PyTorchTensorDataset:
        """The client at one place of one round's cohort."""
        number, place = divmod(turn, workload.cohort)
        inputs, targets = notes.given.client(number + 1, place)
        return PyTorchTensorDataset((torch.from_numpy(inputs), torch.from_numpy(targets)))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain.model(workload.model)

        def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            done["examples"] += len(inputs)
            done["steps"] += 1
            if "trimmed" in notes.variant:
                inputs, targets = bare.trim(inputs, targets)
            return plain.loss(self.inner, inputs, targets)

        def metrics(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Weighted]:
            return {"nothing": Weighted(0, 1)}

    class Ended(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            notes.round_ended()
            return False, Metrics()

    module = Model()
    plain.load(module.inner, notes.given.weights)
    model = PyTorchModel(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    data = FederatedDataset(make_dataset_fn=one, user_sampler=lambda: next(turns))
    FederatedAveraging().run(
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=model,
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=workload.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=workload.cohort,
            val_cohort_size=0,
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=workload.lr,
            local_batch_size=workload.batch_size,
        ),
        callbacks=[Ended()],
        send_metrics_to_platform=False,
    )
    counts = torch.tensor([done["examples"], done["steps"]])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    if rank == 0:
        examples, steps = map(int, counts)
        weights = np.array(plain.vector(module.inner))
        notes.finish(weights, examples=examples, steps=steps, packages=("pfl", "torch"))


if __name__ == "__main__":
    if "PFL_WORKER_RANK" in os.environ or any("1 process" in a for a in sys.argv):
        train()
    else:
        supervise(2)
