"""An independent federated averaging in plain PyTorch, which Potluck's executors are compared with.

Every client trains a new module with `torch.optim.SGD`; what its parameters and floating-point
buffers are afterwards is averaged by examples. Only the seeds of Potluck's streams are shared, so
that weights start alike and batches are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from potluck import FedAvg
from potluck.core import derive_seed
from potluck.core.seeds import stream
from potluck.data import FederatedData

State = dict[str, Tensor]


def new(make: Callable[[], nn.Module], state: State | None = None, seed: int = 0) -> nn.Module:
    """A module as the run's seed makes it, with these tensors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        module = make()
    if state is not None:
        with torch.no_grad():
            for name, tensor in tensors(module).items():
                tensor.copy_(state[name])
    return module


def tensors(module: nn.Module) -> State:
    """Parameters and floating-point buffers, themselves."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}


def averaged(
    make: Callable[[], nn.Module],
    data: FederatedData,
    algorithm: FedAvg,
    rounds: int,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
) -> State:
    """The global model after some rounds in which all clients take part."""
    state = {name: tensor.detach().clone() for name, tensor in tensors(new(make)).items()}
    for round in range(1, rounds + 1):
        sums = {
            name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()
        }
        for client in range(data.num_clients):
            local = _trained(new(make, state), data, algorithm, round, client, loss)
            share = data.client(client).num_examples / data.train.num_examples
            for name, tensor in tensors(local).items():
                sums[name] += share * tensor.detach().double()
        state = {name: total.float() for name, total in sums.items()}
    return state


def _trained(
    module: nn.Module,
    data: FederatedData,
    algorithm: FedAvg,
    round: int,
    client: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> nn.Module:
    examples = data.client(client)
    order = stream(0, "batches", round, client).permutation(examples.num_examples)
    inputs = torch.from_numpy(np.array(examples.inputs)[order])
    targets = torch.from_numpy(np.array(examples.targets)[order])
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=algorithm.client_lr_at(round))
    size = algorithm.batch_size or len(inputs)
    torch.manual_seed(derive_seed(0, "model", round, client))
    for _ in range(algorithm.local_epochs):
        for first in range(0, len(inputs), size):
            optimizer.zero_grad()
            outputs = module(inputs[first : first + size])
            loss(outputs, targets[first : first + size]).backward()
            optimizer.step()
    return module


def evaluated(make: Callable[[], nn.Module], state: State, data: FederatedData) -> float:
    """The mean loss on the test examples."""
    module = new(make, state).eval()
    inputs, targets = (torch.from_numpy(np.array(array)) for array in data.test)
    with torch.no_grad():
        return float(functional.cross_entropy(module(inputs), targets))
