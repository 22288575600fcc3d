"""Arrays of one's own meet a built-in model: they are trained, or refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.config.experiment import check_experiment
from potluck.core import PotluckError
from potluck.simulation import build_data, build_task, train

RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal((20, *shape)).astype(np.float32)


def classes(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 3, (20, *shape))


def experiment(folder: Path, inputs: Any, targets: Any, model: str, **task: Any) -> Any:
    (folder / "data").mkdir()
    for name in "ab":
        np.savez(folder / "data" / f"{name}.npz", inputs=inputs, targets=targets)
    content = {
        "name": "own",
        "task": {"data": "folder", "path": str(folder / "data"), "model": model, **task},
        "partition": {"kind": "own"},
        "algorithm": {"client_lr": 0.01},
        "run": {"rounds": 1, "cohort": 1.0, "executor": "loop"},
    }
    return check_experiment(content, "here")


@pytest.mark.parametrize(
    ("inputs", "targets", "model", "message"),
    [
        (floats(4), classes(1), "2nn", r"shape=\(20, 1\) in .*a\.npz. Give targets\[:, 0\]"),
        (floats(4), np.eye(4, dtype=int)[classes()], "2nn", "one-hot classes.*argmax"),
        (floats(1, 4, 4), classes(8, 8), "2nn", r"one class an example, got .*\(8, 8\)"),
        (floats(), classes(), "logistic", r"needs features, .*Give inputs\[:, None\]"),
        (floats(28, 28), classes(), "cnn", r"\(28, 28\)\. .* or give inputs\[:, None\]\.$"),
        (
            floats(4),
            classes(),
            "cnn",
            r"\[channels, height, width\], got .*\(4,\)\. .*'logistic'\.$",
        ),
        (floats(28, 28, 1), classes(), "cnn", r"channels first: inputs\.transpose\(0, 3, 1, 2\)"),
        (np.full((20, 1, 8, 8), 255, np.uint8), classes(), "cnn", "255: say task.scale = .pixels"),
    ],
)
def test_shapes_that_a_model_does_not_take_are_refused_in_words(
    tmp_path: Path, inputs: Any, targets: Any, model: str, message: str
) -> None:
    asked = experiment(tmp_path, inputs, targets, model)
    with pytest.raises(PotluckError, match=message):
        build_task(asked, build_data(asked))


@pytest.mark.parametrize(
    ("inputs", "targets", "task"),
    [
        (floats(4), floats(2), {}),
        (floats(4), floats(1), {}),
        (floats(3, 4), classes(), {}),
        (floats(4), classes(3) > 0, {"kind": "multilabel"}),
        (np.full((20, 1, 8, 8), 200, np.uint8), classes(), {"scale": "pixels"}),
        (floats(4), classes() * 10, {"kind": "classes"}),
        (floats(4), classes() * 10, {"kind": "regression"}),
    ],
)
def test_shapes_that_a_model_takes_are_trained_and_the_manifest_says_what_they_are(
    tmp_path: Path, inputs: Any, targets: Any, task: dict[str, Any]
) -> None:
    asked = experiment(tmp_path, inputs, targets, "logistic", **task)
    *_, done = train(asked, tmp_path / "run")
    assert np.isfinite(done.weights).all()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    data = build_data(asked)
    assert data.schema is not None
    assert manifest["schema"] == json.loads(json.dumps(data.schema.to_json()))
    assert manifest["kind"] == data.kind
    assert manifest["classes"] == (None if data.classes is None else list(data.classes))
