"""Federated training: examples stay with 100 clients, and their models are averaged.

Most clients have examples of two digits only. In a round ten clients train the model on their
own examples, and the average of the ten models is the next one. Compare with `centralized.py`:
`diff examples/centralized.py examples/federated.py` shows all that changes.
"""

from potluck import FedAvg, Task, TwoNN, datasets, partitions, rounds

# Each client's examples stay with it.
data = partitions.shards(datasets.digits(), clients=100, seed=0)
task = Task(model=lambda: TwoNN(input_shape=(1, 8, 8)), data=data)
# Five passes of each client over its own, before their models are averaged.
algorithm = FedAvg(client_lr=0.3, local_epochs=5, batch_size=10)
for round in rounds(algorithm, task, cohort=10, num_rounds=30, evaluate_every=10):
    if round.metrics:
        print(f"round {round.number:2}: accuracy {round.metrics['accuracy']:.3f}")
