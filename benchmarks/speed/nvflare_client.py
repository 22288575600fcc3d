"""What the NVFlare contender runs as a client: receive, train, send, until told to stop."""

from __future__ import annotations

import sys
from pathlib import Path

import nvflare.client as flare
import plain
import torch
from work import read

folder, counts, padding = sys.argv[1:]
torch.set_num_threads(1)
given = read(Path(folder))
workload = given.workload
module = plain.model(workload.model)
flare.init()
place = int(flare.get_site_name().rpartition("-")[2]) - 1
while flare.is_running():
    received = flare.receive()
    if received is None:
        break
    plain.load(module, received.params["numpy_key"])
    inputs, targets = given.client(received.current_round + 1, place)
    steps = plain.train(
        module, inputs, targets, lr=workload.lr, batch_size=workload.batch_size,
        trims=padding == "trimmed",
    )  # fmt: skip
    with Path(counts).open("a") as file:
        file.write(f"{len(inputs)} {steps}\n")
    flare.send(
        flare.FLModel(
            params={"numpy_key": plain.vector(module)},
            meta={"NUM_STEPS_CURRENT_ROUND": steps},
        )
    )
