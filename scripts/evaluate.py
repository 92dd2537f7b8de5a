"""Evaluate a trained model on a whole text: loss, perplexity, bits per byte. Needs the run's folder and the text.

`python scripts/evaluate.py run=latest`; `--help` shows every key.
"""

import os
from functools import partial
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from omegaconf import DictConfig
from rich.table import Table

from language_model.data.datamodule import TokenData
from language_model.data.prepare import prepare
from language_model.data.text_files import NonEmpty, PathOrPaths, TextFiles, errors_name
from language_model.data.tokenizer_file import tokenizer_from_file
from language_model.data.windows import check_validation
from language_model.files import display_path, write_json
from language_model.runs.command_line import entry_point
from language_model.runs.config import ConfigError, build, check_values, errors_for_key
from language_model.runs.folder import safe_folder_name
from language_model.runs.load import LoadedRun, load_checkpoint, load_run
from language_model.terminal import setup_logging, terminal
from language_model.training.hardware import find_device
from language_model.training.module import LanguageModel

KEYS = {
    "run": NonEmpty | int,
    "checkpoint": NonEmpty,
    "data.path": PathOrPaths | None,
    "data.cache": NonEmpty,
    "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps"],
    "output": NonEmpty | None,
}


@entry_point("evaluate")
def main(config: DictConfig) -> None:
    """Evaluate, print the metrics as a table and save them as JSON."""
    check_values(config, KEYS)
    setup_logging()
    with errors_for_key(f"accelerator={config.accelerator}"):
        find_device(config.accelerator)
    loaded = load_run(str(config.run), config.checkpoint, as_trained=True)
    output = Path(config.output) if config.output else loaded.folder / "evaluation.json"
    check_output(output)
    if config.data.path is None:
        data, measured = run_data(loaded, config.data.cache)
    else:
        data, measured = whole_text(config.data.path, loaded, config.data.cache), "the whole text"
        output = output if config.output else output.with_name(f"evaluation-{safe_folder_name(data.name)}.json")
    figures, num_tokens = evaluate(loaded, data, config.accelerator)
    step = load_checkpoint(loaded.checkpoint)["global_step"]
    terminal.print(f"{display_path(loaded.checkpoint)}, step {step:,}, on {data.name}, {measured}", soft_wrap=True)
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " ") + (" (nats a token)" if name == "loss" else ""), f"{value:.4f}")
    table.add_row("tokens predicted", f"{num_tokens:,}")
    terminal.print(table)
    facts = {"checkpoint": str(loaded.checkpoint), "step": step, "data": data.name, "measured_on": measured}
    with errors_for_key("output"):
        write_json(output, facts | {"tokens": num_tokens} | figures)
    terminal.print(f"saved as JSON in {display_path(output)}", soft_wrap=True)


def check_output(output: Path) -> None:
    """Raise ConfigError, before anything is measured, if the figures cannot be written there."""
    if output.is_dir():
        raise ConfigError(f"output={output}: it is a folder; allowed: a file, as output={output / 'evaluation.json'}")
    if not output.parent.is_dir():
        raise ConfigError(f"output={output}: there is no folder {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"output={output}: nothing can be written there; allowed: a file elsewhere, as output=a.json")


def evaluate(loaded: LoadedRun, data: TokenData, accelerator: str) -> tuple[dict[str, float], int]:
    """Return the metrics over all of the validation data, and how many tokens were predicted for them.

    Of the run's trainer, only the precision counts: a limit on batches, say, is not the text's.
    """
    with errors_for_key("trainer"):
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=loaded.config.trainer.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=terminal.is_terminal,
        )
    # Optimizer and schedule are not used.
    module = LanguageModel(loaded.network, torch.optim.SGD, float, loaded.tokenizer)
    (figures,) = trainer.validate(module, data, verbose=False)
    return {name.removeprefix("val/"): value for name, value in figures.items()}, module.num_validated_tokens


def run_data(loaded: LoadedRun, cache: str) -> tuple[TokenData, str]:
    """Return the validation split of the run's data, without one the training data in its place; and which it is."""
    if "cache" in loaded.config.data:
        loaded.config.data.cache = cache  # the run's own may be anywhere
    data: TokenData = build(loaded.config, "data")
    if data.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
        raise ConfigError("data.path: the run's text has changed since; a text is needed, as data.path=my.txt")
    if data.has_validation:
        return data, "the validation split"
    parts = [part for part in data.train_windows.parts if len(part) > 1]
    return as_validation(data.name, parts, loaded), "the training text: the run has no validation split"


def whole_text(path: str | list[str], loaded: LoadedRun, cache: str) -> TokenData:
    """Return a whole text as validation data, tokenized with the run's tokenizer and by the run's settings."""
    settings = loaded.config.data
    options = {key: settings[key] for key in ("field", "encoding", "newlines") if key in settings}

    def check_num_tokens(split: str, facts: dict[str, int]) -> None:
        with errors_name("path", path):
            check_validation(facts["tokens"], "the text")

    with errors_for_key("data", parameters=("path", "cache")):
        text = TextFiles(path, **options)
        tokenizer = partial(tokenizer_from_file, path=str(loaded.folder / "tokenizer.json"))
        wanted = settings.get("end_of_text")
        ends = (text.has_jsonl if wanted is None else wanted) and loaded.tokenizer.end_of_text is not None
        tokens = prepare(text, None, 0.0, tokenizer, ends, Path(cache), check_num_tokens).train
    return as_validation(text.name, [tokens], loaded)


def as_validation(name: str, parts: list, loaded: LoadedRun) -> TokenData:
    """Return token sequences as validation data, in windows and batches of the run's sizes."""
    settings = loaded.config.data
    of_training = {"stride": 1, "num_workers": 0, "seed": 0}  # no figure depends on them
    return TokenData(name, loaded.tokenizer, [], parts, settings.seq_len, settings.batch_size, **of_training)


if __name__ == "__main__":
    main()
