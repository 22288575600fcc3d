"""FedJAX's own federated averaging. The variant is its backend for the clients of a round.

"jit": one client after another, a compiled step, XLA's threads inside a step. "pmap": as many
clients at a time as there are devices; XLA is told to show two CPU devices. Models are functions of
the same parameters as PyTorch's, with images as [height, width, channels], which is what XLA's
convolutions on a CPU are made for; the LSTM multiplies all inputs of a layer at once and scans.
Batches keep the given order (`skip_shuffle`). Lines are padded to 80 steps in every batch: another
width would be another compilation.

FedJAX 0.0.17, the last one, is from 2023. It runs as it is on JAX 0.4.23; on the newest ("newest
JAX") with one removed name put back, and without `pmap`, of which more was removed.
"""

from __future__ import annotations

import os
import sys

if any(argument.startswith("pmap") for argument in sys.argv):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax

if not hasattr(jax, "tree_map"):
    jax.tree_map = jax.tree_util.tree_map  # FedJAX 0.0.17 is older than its removal

import fedjax
import numpy as np
from fedjax.algorithms.fed_avg import federated_averaging
from jax import numpy as jnp
from notes import Notes
from work import PADDING

Parameters = dict[str, jax.Array]
HIDDEN = 256
# Names and shapes in PyTorch's order of parameters.
LAYOUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "cnn": {
        "conv1": (32, 1, 5, 5), "bias1": (32,), "conv2": (64, 32, 5, 5), "bias2": (64,),
        "hidden": (512, 3136), "hidden_bias": (512,), "out": (10, 512), "out_bias": (10,),
    },
    "2nn": {
        "w1": (200, 784), "b1": (200,), "w2": (200, 200), "b2": (200,), "w3": (10, 200),
        "b3": (10,),
    },
    "lstm": {
        "embedding": (258, 8),
        "in0": (1024, 8), "back0": (1024, 256), "in_bias0": (1024,), "back_bias0": (1024,),
        "in1": (1024, 256), "back1": (1024, 256), "in_bias1": (1024,), "back_bias1": (1024,),
        "out": (258, 256), "out_bias": (258,),
    },
    "logistic": {"w1": (10, 784), "b1": (10,)},
    "narrow": {"w1": (10, 64), "b1": (10,)},
    "empty": {"w1": (2, 1), "b1": (2,)},
}  # fmt: skip


def cnn(p: Parameters, images: jax.Array) -> jax.Array:
    maps = images
    for i in ("1", "2"):
        maps = jax.lax.conv_general_dilated(
            maps, p[f"conv{i}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        maps = jax.nn.relu(maps + p[f"bias{i}"])
        maps = jax.lax.reduce_window(
            maps, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
    hidden = jax.nn.relu(maps.reshape(len(maps), -1) @ p["hidden"] + p["hidden_bias"])
    return hidden @ p["out"] + p["out_bias"]


def dense(p: Parameters, inputs: jax.Array) -> jax.Array:
    hidden = inputs.reshape(len(inputs), -1)
    last = len(p) // 2
    for i in range(1, last + 1):
        hidden = hidden @ p[f"w{i}"] + p[f"b{i}"]
        hidden = hidden if i == last else jax.nn.relu(hidden)
    return hidden


def lstm(p: Parameters, symbols: jax.Array) -> jax.Array:
    """Logits [steps, batch, symbols]."""
    sequence = p["embedding"][symbols.T]  # [steps, batch, 8]
    for layer in ("0", "1"):
        back = p[f"back{layer}"]
        bias = p[f"in_bias{layer}"] + p[f"back_bias{layer}"]

        def cell(state, gates, back=back):
            hidden, memory = state
            i, f, g, o = jnp.split(gates + hidden @ back, 4, axis=1)
            memory = jax.nn.sigmoid(f) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(memory)
            return (hidden, memory), hidden

        zeros = jnp.zeros((symbols.shape[0], HIDDEN))
        _, sequence = jax.lax.scan(cell, (zeros, zeros), sequence @ p[f"in{layer}"] + bias)
    return sequence @ p["out"] + p["out_bias"]


def loss(p: Parameters, batch: dict[str, jax.Array], rng: jax.Array) -> jax.Array:
    """Mean cross-entropy over all targets that are not padding."""
    apply = {"cnn": cnn, "lstm": lstm}.get(workload.model, dense)
    logits = jax.nn.log_softmax(apply(p, batch["x"]))
    targets = batch["y"].T if workload.is_text else batch["y"]
    real = targets != PADDING
    losses = -jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(losses * real) / jnp.sum(real)


def parameters(vector: np.ndarray) -> Parameters:
    """From PyTorch's vector: matrices multiply from the right, kernels end with the channels."""
    sizes = [int(np.prod(shape)) for shape in layout.values()]
    parts = np.split(np.array(vector), np.cumsum(sizes)[:-1])
    found: Parameters = {}
    for (name, shape), part in zip(layout.items(), parts, strict=True):
        value = part.reshape(shape)
        if len(shape) == 4:
            value = value.transpose(2, 3, 1, 0)
        elif name == "hidden":  # its inputs are flattened in another order
            value = value.reshape(512, 64, 7, 7).transpose(2, 3, 1, 0).reshape(3136, 512)
        elif len(shape) == 2 and name != "embedding":
            value = value.T
        found[name] = jnp.asarray(value)
    return found


def vector(p: Parameters) -> np.ndarray:
    """The way back."""
    parts = []
    for name, shape in layout.items():
        value = np.asarray(p[name])
        if len(shape) == 4:
            value = value.transpose(3, 2, 0, 1)
        elif name == "hidden":
            value = value.reshape(7, 7, 64, 512).transpose(3, 2, 0, 1)
        elif len(shape) == 2 and name != "embedding":
            value = value.T
        parts.append(value.ravel())
    return np.concatenate(parts)


notes = Notes()
given = notes.given
workload = given.workload
layout = LAYOUTS[workload.model]
fedjax.set_for_each_client_backend(notes.variant.partition(",")[0])
hparams = fedjax.ShuffleRepeatBatchHParams(batch_size=workload.batch_size, skip_shuffle=True)
algorithm = federated_averaging(
    jax.grad(loss), fedjax.optimizers.sgd(workload.lr), fedjax.optimizers.sgd(1.0), hparams
)
state = algorithm.init(parameters(given.weights))
rngs = list(jax.random.split(jax.random.PRNGKey(0), workload.cohort))  # nothing here draws
examples = steps = 0
for number in range(1, workload.rounds + 1):
    clients = []
    for place in range(workload.cohort):
        x, y = given.client(number, place)
        if workload.model == "cnn":
            x = x.reshape(-1, 28, 28, 1)
        clients.append(
            (place, fedjax.ClientDataset({"x": x, "y": y.astype(np.int32)}), rngs[place])
        )
        examples += len(x)
        steps += -(-len(x) // workload.batch_size)
    state, _ = algorithm.apply(state, clients)
    jax.block_until_ready(state.params)
    notes.round_ended()
notes.finish(
    vector(state.params), examples=examples, steps=steps, packages=("fedjax", "jax", "jaxlib")
)
