"""Tokenize a corpus before training, and print its size.

`python scripts/prepare.py data=text data.path=my.txt`. Takes the keys of scripts/train.py, whose runs then reuse the
prepared corpus.
"""

from omegaconf import DictConfig

from language_model.runs.command_line import entry_point
from language_model.runs.config import ConfigError, build, check_config


@entry_point("prepare")
def main(config: DictConfig) -> None:
    """Prepare the corpus of the config, and print its size as a table."""
    from rich.table import Column, Table

    from language_model.data.datamodule import TextData
    from language_model.files import display_path
    from language_model.terminal import setup_logging, terminal

    setup_logging()
    check_config(config)
    data = build(config, "data")
    if not isinstance(data, TextData):
        raise ConfigError("data: only text can be prepared")
    corpus = data.corpus
    table = Table("", *(Column(split, justify="right") for split in corpus.facts), title=data.name)
    for what in ("documents", "characters", "bytes", "tokens"):
        table.add_row(what, *(f"{facts[what]:,}" for facts in corpus.facts.values()))
    table.add_row("bytes a token", *(f"{facts['bytes'] / facts['tokens']:.2f}" for facts in corpus.facts.values()))
    terminal.print(table)
    terminal.print(
        f"vocabulary {corpus.tokenizer.vocab_size:,}, saved in {display_path(corpus.folder)}", soft_wrap=True
    )


if __name__ == "__main__":
    main()
