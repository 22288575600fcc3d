"""Centralized training: all examples lie in one place, and one model passes over them.

Federated averaging with a single client is plain SGD, and a round is an epoch. Compare with
`federated.py`: `diff examples/centralized.py examples/federated.py` shows all that changes.
"""

from potluck import FedAvg, Task, TwoNN, datasets, partitions, rounds

# Everybody's examples in one place.
data = partitions.iid(datasets.digits(), clients=1, seed=0)
task = Task(model=lambda: TwoNN(input_shape=(1, 8, 8)), data=data)
# One pass over all of them in batches of 10.
algorithm = FedAvg(client_lr=0.3, local_epochs=1, batch_size=10)
for round in rounds(algorithm, task, cohort=1, num_rounds=30, evaluate_every=10):
    if round.metrics:
        print(f"round {round.number:2}: accuracy {round.metrics['accuracy']:.3f}")
