"""A natural partition: one client for each person who wrote.

With MNIST and QMNIST's list of its writers at hand (`potluck data get mnist`, `potluck data get
qmnist`) the clients are the 539 writers of MNIST's training images. Without them, they are the
14 forms from which scikit-learn's digits were taken; nothing is downloaded.
"""

import numpy as np
from sklearn.datasets import load_digits

from potluck import (
    FedAvg,
    FederatedData,
    Task,
    TwoNN,
    datasets,
    federated_evaluation,
    own_data,
    partitions,
    rounds,
)
from potluck.data.published_files import catalogue


def mnist_by_writer() -> FederatedData:
    """Every writer's own images; the test images, of other people, are shared."""
    return partitions.by_group(datasets.mnist(writers=True))


def digits_by_form() -> FederatedData:
    """People copied the same form, which begins with 0123456789: there a new client begins."""
    digits = load_digits()
    inputs = (digits.images[:, None] / 16).astype(np.float32)
    runs = np.lib.stride_tricks.sliding_window_view(digits.target, 10)
    starts = np.flatnonzero((runs == np.arange(10)).all(axis=1))
    starts = starts[np.diff(starts, prepend=-100) > 50]  # a form repeats the run at its start
    ends = [*starts[1:], len(inputs)]
    forms = {
        f"form-{i:02}": (inputs[start:end], digits.target[start:end])
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    }
    return own_data.from_clients(forms, name="digits by form")


here = {entry.name for entry in catalogue() if entry.present}
if {"mnist", "qmnist"} <= here:
    data, cohort = mnist_by_writer(), 20
else:
    print("MNIST and QMNIST are not here: the forms of scikit-learn's digits take their place.")
    data, cohort = digits_by_form(), 7

sizes = data.sizes
print(f"{data.num_clients} clients with {sizes.min()} to {sizes.max()} training images each")
shape = data.train.inputs.shape[1:]
task = Task(model=lambda: TwoNN(shape), data=data)
algorithm = FedAvg(client_lr=0.2, local_epochs=2)
for round in rounds(algorithm, task, cohort=cohort, num_rounds=10, evaluate_every=5):
    if round.metrics:
        print(f"round {round.number:2}: test accuracy {round.metrics['accuracy']:.3f}")
accuracy = federated_evaluation(task, round.weights)["accuracy"]
print(f"per client: mean {accuracy.mean:.3f}, worst tenth {accuracy.worst_decile:.3f}")
