"""The direction in which a metric gets better, by its name.

Files hold metrics by name alone, so their readers (reports, targets, searches) use this function. A
metric may have an attribute `higher_is_better`, which decides where the metric is at hand.
"""

from __future__ import annotations

import re

_SMALLER_IS_BETTER = frozenset(
    [
        "loss",
        "error",
        "errors",
        "mse",
        "mae",
        "rmse",
        "mape",
        "msle",
        "rmsle",
        "nll",
        "ppl",
        "perplexity",
        "bpc",
        "bits",
        "entropy",
        "brier",
        "deviance",
        "distance",
        "divergence",
        "ece",
        "wer",
        "cer",
        "eer",
        "mistakes",
        "misses",
        "regret",
        "cost",
        "risk",
    ]
)


def higher_is_better(name: str, metric: object = None) -> bool:
    """Returns whether a larger value is better: yes of accuracy and r2, no of losses and errors.

    Args:
        name: as in a task's metrics or in `rounds.jsonl`: "loss", "train_loss", "rmse".
        metric: the metric itself, if it is at hand; its attribute `higher_is_better` decides.
    """
    said = getattr(metric, "higher_is_better", None)
    if isinstance(said, bool):
        return said
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return _SMALLER_IS_BETTER.isdisjoint(words)
