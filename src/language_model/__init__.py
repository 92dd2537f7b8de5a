"""Train GPT language models with Lightning, Hydra and TensorBoard.

The data takes one way through the package:

    text files -> tokenizer -> token files -> shifted windows in an order -> batches          `data`
    -> GPT -> logits, and sampled text                                                        `model`
    -> loss, metrics -> optimizer and schedule -> weights, checkpoints                        `training`

Around it, from the ground up; a folder imports only from those above it in this list:

- `files`, `terminal`, `startup`: whole-file writes, the log, a faster start
- `model`: the network and sampling; imports nothing of the package
- `data`: everything from text to batches
- `training`: the LightningModule, optimizers, schedules, callbacks, checkpoints, what the hardware decides
- `runs`: one run: its config, its plan, its folder, resuming and loading it. Only `runs` and `sweeps` know Hydra
- `pages`: what people look at, drawn from the files that runs leave
- `sweeps`: many runs: grids, searches, summaries, comparisons, the chapter's exercises

For a notebook, this module offers `plan` and `fit` (a run), and `load_run` and `generate` (a trained one).
"""

import importlib
import sys
from typing import Any

from language_model.startup import QuickTorchmetrics

sys.meta_path.insert(0, QuickTorchmetrics())

_OFFERED = {
    "plan": "language_model.runs.plan",
    "fit": "language_model.runs.fit",
    "load_run": "language_model.runs.load",
    "generate": "language_model.model.generate",
}


def __getattr__(name: str) -> Any:
    """Import what is offered when it is first used: importing torch takes seconds."""
    if name in _OFFERED:
        return getattr(importlib.import_module(_OFFERED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
