"""Train GPT language models with Lightning, Hydra and TensorBoard.

The way of the data is one line, and these modules stand along it:

    text files (`corpus`) -> `tokenizer` -> token files (`prepare`, `tokens`) -> shifted `windows` and their order
    -> batches (`data`) -> `gpt` -> logits -> `module` (loss, metrics) -> `optim` and `schedule` -> checkpoints
    -> `generate`

`callbacks` and `dashboard` are what watches a run; `checkpoint` keeps what it can go on from; `config` is Hydra's
side: it checks configs and builds from them; `run` is what a run leaves on disk, and `load` brings it back. `sweep` and
`search` do many runs, `summary` says what they have come to, `plots` draws it, `compare` says which differences are
real. Only `config`, `run`, `load`, `sweep`, `search` and the scripts know Hydra. `gpt`, `tokenizer`, `schedule`,
`optim` and `generate` import nothing from the package, and `module` is handed the network, the optimizer and the
schedule.
"""

import sys

from language_model.startup import QuickTorchmetrics

sys.meta_path.insert(0, QuickTorchmetrics())
