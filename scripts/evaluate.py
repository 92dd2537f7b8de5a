"""Evaluate a trained model on a whole text: loss, perplexity, bits per byte. Needs only the run's folder.

`python scripts/evaluate.py run=latest`; `--help` shows every key.
"""

import json
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.table import Table

from language_model.data.datamodule import TokenData
from language_model.data.prepare import prepare
from language_model.data.text_files import TextFiles
from language_model.data.tokenizer_file import tokenizer_from_file
from language_model.data.windows import check_validation
from language_model.files import display_path
from language_model.runs.config import ConfigError, build, check_values, entry_point, errors_for_key
from language_model.runs.load import LoadedRun, load_run
from language_model.terminal import setup_logging, terminal
from language_model.training.hardware import device_type
from language_model.training.module import LanguageModel

KEYS = {
    "run": str | int,
    "checkpoint": str,
    "data.path": str | list[str] | None,
    "accelerator": str,
    "output": str | None,
}


@entry_point("evaluate")
def main(config: DictConfig) -> None:
    """Evaluate, print the metrics as a table and save them as JSON."""
    check_values(config, KEYS)
    setup_logging()
    with errors_for_key("accelerator"):
        device = torch.device(device_type(config.accelerator))
    loaded = load_run(str(config.run), config.checkpoint, device)
    settings = loaded.config
    settings.trainer.update(accelerator=config.accelerator, devices=1, num_nodes=1, strategy="auto")
    data = run_data(loaded) if config.data.path is None else text_as_validation(config.data.path, loaded)
    bar = terminal.is_terminal
    trainer = build(settings, "trainer", logger=False, enable_checkpointing=False, enable_progress_bar=bar)
    # Optimizer and schedule are not used.
    module = LanguageModel(loaded.network, torch.optim.SGD, float, loaded.tokenizer)
    (figures,) = trainer.validate(module, data, verbose=False)
    terminal.print(f"{display_path(loaded.checkpoint)} on {data.name}", soft_wrap=True)
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name.removeprefix("val/").replace("_", " "), f"{value:.4f}")
    table.add_row("tokens", f"{data.num_val_tokens:,}")
    terminal.print(table)
    facts = {"checkpoint": str(loaded.checkpoint), "data": data.name, "tokens": data.num_val_tokens, **figures}
    output = Path(config.output) if config.output else loaded.folder / "evaluation.json"
    with errors_for_key("output"):
        output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    terminal.print(f"saved as JSON in {display_path(output)}", soft_wrap=True)


def run_data(loaded: LoadedRun) -> TokenData:
    """Return the data that the run was trained and validated on."""
    data = build(loaded.config, "data")
    if not data.has_validation:
        raise ConfigError("data.path: the run has no validation split; a text is needed, as data.path=my.txt")
    if data.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
        raise ConfigError("data.path: the run's text has changed since; a text is needed, as data.path=my.txt")
    return data


def text_as_validation(path: str | list[str], loaded: LoadedRun) -> TokenData:
    """Return a whole text as a validation split, tokenized with the run's tokenizer."""
    settings = loaded.config.data
    with errors_for_key("data.path"):
        text = TextFiles(path, settings.get("field", "text"), settings.get("encoding", "utf-8"))
        tokenizer = partial(tokenizer_from_file, path=str(loaded.folder / "tokenizer.json"))
        ends = text.has_jsonl and loaded.tokenizer.end_of_text is not None
        tokens = prepare(text, None, 0.0, tokenizer, ends, Path(settings.cache), check_num_tokens).train
    sizes = (settings.seq_len, settings.batch_size, settings.stride, settings.num_workers, settings.seed)
    return TokenData(text.name, loaded.tokenizer, [], [tokens], *sizes)


def check_num_tokens(split: str, num_tokens: int) -> None:
    """Raise ValueError if the text has too few tokens to predict one."""
    check_validation(num_tokens, "the text")


if __name__ == "__main__":
    main()
