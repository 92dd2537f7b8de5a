"""Train GPT language models with Lightning, Hydra and TensorBoard.

The way of the data is one line, and these modules stand along it:

    text files (`corpus`) -> `tokenizer` -> token files (`prepare`, `tokens`) -> shifted `windows` and their order
    -> batches (`data`) -> `gpt` -> logits -> `module` (loss, metrics) -> `optim` and `schedule` -> checkpoints
    -> `generate`

`callbacks` is what watches a run; `checkpoint` keeps what it can go on from; `config` is Hydra's side: it checks
configs and builds from them; `run` is what a run leaves on disk, and `load` brings it back. Only `config`, `run`,
`load` and the scripts know Hydra. `gpt`, `tokenizer`, `schedule`, `optim` and
`generate` import nothing from the package, and `module` is handed the network, the optimizer and the schedule.
"""
