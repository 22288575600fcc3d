"""The hand-written loop: one client after another, state dictionaries averaged.

Variants: threads of PyTorch's kernels, "1" or "2"; with "trimmed" after it ("1 trimmed") without
the steps that a whole batch of lines pads.
"""

import torch
from notes import Notes
from plain import load, model, train, vector

notes = Notes()
given = notes.given
workload = given.workload
torch.set_num_threads(int(notes.variant.split()[0]))
module = model(workload.model)
load(module, given.weights)
weights = {name: value.clone() for name, value in module.state_dict().items()}
examples = steps = 0
for number in range(1, workload.rounds + 1):
    mean = {name: torch.zeros_like(value) for name, value in weights.items()}
    total = 0
    for place in range(workload.cohort):
        module.load_state_dict(weights)
        inputs, targets = given.client(number, place)
        steps += train(
            module, inputs, targets, lr=workload.lr, batch_size=workload.batch_size,
            trims="trimmed" in notes.variant,
        )  # fmt: skip
        for name, value in module.state_dict().items():
            mean[name] += len(inputs) * value
        total += len(inputs)
    weights = {name: value / total for name, value in mean.items()}
    examples += total
    notes.round_ended()
module.load_state_dict(weights)
notes.finish(vector(module), examples=examples, steps=steps, packages=("torch",))
