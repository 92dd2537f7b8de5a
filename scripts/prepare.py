"""Tokenize a corpus ahead of the runs that train on it, and say what is in it.

`python scripts/prepare.py data=text data.path=my.txt`: takes what a run takes, and does what it would do first.
"""

from omegaconf import DictConfig

from language_model.runs.config import ConfigError, build, check_config, entry_point


@entry_point("prepare")
def main(config: DictConfig) -> None:
    """Prepare a corpus, as the config says."""
    from rich.table import Column, Table

    from language_model.data.datamodule import TextData
    from language_model.files import display_path
    from language_model.terminal import setup_logging, terminal

    setup_logging()
    check_config(config)
    data = build(config, "data")
    if not isinstance(data, TextData):
        raise ConfigError("data: only text is to be prepared")
    corpus = data.corpus
    table = Table("", *(Column(split, justify="right") for split in corpus.facts), title=data.name)
    for what in ("documents", "characters", "bytes", "tokens"):
        table.add_row(what, *(f"{facts[what]:,}" for facts in corpus.facts.values()))
    table.add_row("bytes a token", *(f"{facts['bytes'] / facts['tokens']:.2f}" for facts in corpus.facts.values()))
    terminal.print(table)
    terminal.print(f"vocabulary {corpus.tokenizer.vocab_size:,}, kept in {display_path(corpus.folder)}", soft_wrap=True)


if __name__ == "__main__":
    main()
