"""What a model may be: anything else is refused in words, before anything is trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from potluck import FedAvg, Task, own_data, rounds


class Needy(nn.Module):
    def __init__(self, width, *, depth):
        super().__init__()


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.cfloat))


class Overlapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.randn(3, 6))
        self.other = nn.Parameter(self.one.detach())


class LazyNorm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LazyBatchNorm1d(affine=False), nn.Linear(6, 3))


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def frozen():
    return net().requires_grad_(False)


def logits(inputs):
    return inputs[:, :3]


def client():
    random = np.random.default_rng(0)
    return random.normal(size=(20, 6)).astype(np.float32), random.integers(0, 3, 20)


REFUSED = {
    "float64": (lambda: net().double(), TypeError, r"got 0\.weight of dtype=torch\.float64\. Call"),
    "float16": (lambda: net().half(), TypeError, r"float32, got 0\.weight of dtype=torch\.float16"),
    "a float64 module": (
        net().double(),
        TypeError,
        r"got 0\.weight of dtype=torch\.float64\. Call",
    ),
    "complex": (Complex, TypeError, r"got weight of dtype=torch\.complex64\. Hold its real"),
    "lazy": (lambda: nn.LazyLinear(3), ValueError, r"have a shape, got weight of a lazy layer"),
    "a lazy module": (nn.LazyLinear(3), ValueError, r"have a shape, got weight of a lazy layer"),
    "a lazy buffer": (LazyNorm, ValueError, r"have numbers, got 0\.running_mean without any"),
    "meta": (lambda: net().to("meta"), ValueError, r"got 0\.weight on device=meta\. Make it"),
    "overlapping": (Overlapping, ValueError, r"share memory, got one and other, which are two"),
    "frozen": (frozen, ValueError, r"a parameter that is trained, got none \(4 frozen\)"),
    "empty": (nn.Flatten, ValueError, r"a parameter that is trained, got none \(0"),
    "needs arguments": (Needy, TypeError, r"got Needy, which needs width, depth\. Give a class by"),
    "a function": (logits, TypeError, r"got logits, which needs inputs\. .* as an nn\.Module"),
    "makes a function": (lambda: logits, TypeError, r"an object of type function from a lambda\."),
    "makes nothing": (
        lambda: None,
        TypeError,
        r"of type NoneType from a lambda\. Return the module",
    ),
    "a lambda": (lambda x: x, TypeError, r"got a lambda, which needs x\. .* lambda: Model\(x=…\),"),
    "an array": (np.zeros(3), TypeError, r"got an object of type ndarray\. Give the module"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("executor", ["loop", "vmap", "auto"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_train_is_refused_in_words(what, executor):
    model, kind, message = REFUSED[what]
    random = np.random.default_rng(0)
    data = own_data.from_clients(
        {
            name: (random.normal(size=(20, 6)).astype(np.float32), random.integers(0, 3, 20))
            for name in "ab"
        }
    )
    with pytest.raises(kind, match=message):
        list(
            rounds(
                FedAvg(client_lr=0.1),
                Task(model=model, data=data),
                cohort=1.0,
                num_rounds=1,
                executor=executor,
            )
        )


@pytest.mark.parametrize("model", [net(), net().eval(), lambda: nn.DataParallel(net()), net])
def test_modules_and_what_makes_them_train(model):
    task = Task(model=model, data=own_data.from_clients({"a": client()}))
    first, last = rounds(FedAvg(client_lr=0.1), task, cohort=1.0, num_rounds=1)
    assert np.abs(first.weights - last.weights).max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("makes", [True, False], ids=["a factory", "a module"])
@pytest.mark.parametrize("how", ["scripted", "traced", "a traced part"])
def test_scripted_modules_train_as_what_they_were_made_of(how, makes, executor):
    def script():
        torch.manual_seed(0)
        module, inputs = net(), torch.ones(2, 6)
        if how == "scripted":
            return torch.jit.script(module)
        if how == "traced":
            return torch.jit.trace(module, inputs)
        return nn.Sequential(torch.jit.trace(module[0], inputs), *module[1:])

    found = []
    data = own_data.from_clients({"a": client(), "b": client()})
    torch.manual_seed(0)
    for model in (net(), script if makes else script()):
        task = Task(model=model, data=data)
        task.module()(torch.ones(2, 6))
        run = rounds(FedAvg(client_lr=0.1), task, cohort=1.0, num_rounds=2, executor=executor)
        *_, last = run
        found.append((last.weights, last.metrics["loss"]))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)
