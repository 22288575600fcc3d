"""FedLab's standalone pipeline: its serial trainer and its synchronous server, in one process.

That is its documented simulation on one machine. Variants: threads of PyTorch's kernels. Clients
are handed over as lists of batches, without the cost of a `DataLoader`; cohorts are the given ones.
"""

# ruff: noqa: E402

from __future__ import annotations

import logging

import plain
import torch

# FedLab imports torchvision for its data sets. The package of the index wants a CUDA build of
# PyTorch and fails without these operators; here they are declared, and nothing calls them.
_names = torch.library.Library("torchvision", "DEF")
_names.define("nms(Tensor boxes) -> Tensor")
_names.define("qnms(Tensor boxes) -> Tensor")

from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.core.standalone import StandalonePipeline
from notes import Notes
from work import PADDING

notes = Notes()
given = notes.given
workload = given.workload
torch.set_num_threads(int(notes.variant.split()[0]))
done = {"examples": 0, "steps": 0}


class Data:
    """The clients of the cohort by their places in it."""

    def get_dataloader(self, place: int, batch_size: int) -> list[tuple[torch.Tensor, ...]]:
        x, y = map(torch.from_numpy, given.client(handler.round + 1, place))
        batches = [
            (x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(x), batch_size)
        ]
        done["examples"] += len(x)
        done["steps"] += len(batches)
        if "trimmed" in notes.variant:
            batches = [plain.bare.trim(*batch) for batch in batches]
        return batches


class Handler(SyncServerHandler):
    def sample_clients(self) -> list[int]:
        return list(range(workload.cohort))


class Pipeline(StandalonePipeline):
    def evaluate(self) -> None:
        notes.round_ended()


module = plain.model(workload.model)
plain.load(module, given.weights)
handler = Handler(module, workload.rounds, 1.0, logger=logging.getLogger("quiet"))
trainer = SGDSerialClientTrainer(module, workload.cohort, logger=logging.getLogger("quiet"))
trainer.setup_dataset(Data())
trainer.setup_optim(1, workload.batch_size, workload.lr)
trainer.criterion = torch.nn.CrossEntropyLoss(ignore_index=PADDING)
Pipeline(handler, trainer).main()
last = handler.model_parameters.numpy()
notes.finish(last, packages=("fedlab", "torch"), **done)
