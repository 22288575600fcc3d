"""Your own data: three ways in, one `FederatedData` out.

Six clinics measured four values of each patient; some patients were ill. Clinics differ in how
many patients they see and in whom they see, and no patient's row leaves its clinic.
"""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from potluck import FedAvg, LogisticRegression, Task, federated_evaluation, own_data, rounds

FEATURES = ["temperature", "pulse", "pressure", "age"]


def clinic(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [patients, 4], scaled by the same rule in every clinic, and who is ill [patients]."""
    random = np.random.default_rng(number)
    values = random.normal(0.3 * number - 0.75, 1.0, size=(40 * (number + 1), len(FEATURES)))
    score = values @ [1.5, 1.0, -0.5, 1.0] + random.normal(size=len(values))
    return values.astype(np.float32), (score > 0.0).astype(np.int64)


# 1. A dictionary: the client's name to its inputs and targets.
clinics = {f"clinic-{number}": clinic(number) for number in range(6)}
data = own_data.from_clients(clinics, name="clinics")

with tempfile.TemporaryDirectory() as name:
    # 2. A folder with one file per client: .npz (as here), .csv or .parquet.
    folder = Path(name) / "clinics"
    folder.mkdir()
    for client, (inputs, targets) in clinics.items():
        np.savez(folder / f"{client}.npz", inputs=inputs, targets=targets)
    from_folder = own_data.from_folder(folder)

    # 3. One table, a data frame or a .csv or .parquet file, with a column that names the client.
    table = pd.concat(
        pd.DataFrame(inputs, columns=FEATURES).assign(clinic=client, ill=targets)
        for client, (inputs, targets) in clinics.items()
    )
    table.to_parquet(Path(name) / "patients.parquet")
    from_table = own_data.from_table(
        Path(name) / "patients.parquet", client_column="clinic", target_column="ill"
    )

print("the three are equal:", data.digest() == from_folder.digest() == from_table.digest())
print("patients who train the model:", dict(zip(data.clients, data.sizes.tolist(), strict=True)))

# Of each client's examples 20 % are its test examples, of each class its share, unless you give
# a test set.
task = Task(model=lambda: LogisticRegression((4,), data.num_classes), data=data)
*_, last = rounds(FedAvg(client_lr=0.1), task, cohort=1.0, num_rounds=20)
accuracy = federated_evaluation(task, last.weights)["accuracy"]
for client, value in zip(data.clients, accuracy.per_client, strict=True):
    print(f"{client}: accuracy {value:.3f}")
print(f"mean over clinics: accuracy {accuracy.mean:.3f}")
