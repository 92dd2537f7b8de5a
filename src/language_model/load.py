"""Load a trained run back, from its folder alone."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from language_model import run as runs
from language_model import tokenizer
from language_model.config import ConfigError, blamed_on, build
from language_model.hardware import best_attention
from language_model.module import FORMAT
from language_model.tokenizer import Tokenizer


class LoadedRun(NamedTuple):
    """A trained run: its network in eval mode, its tokenizer, the config it was made from, and where it was found."""

    network: nn.Module
    tokenizer: Tokenizer
    config: DictConfig
    folder: Path
    checkpoint: Path


def load_run(run: str | Path = "latest", checkpoint: str = "best", device: str | torch.device = "cpu") -> LoadedRun:
    """Load a run.

    Args:
        run: its folder or name; ``latest``; or ``best``, the lowest metric among the runs on the latest one's data.
        checkpoint: ``best``, ``last``, or a checkpoint's file.
        device: where the network shall be.

    Raises:
        ConfigError: there is no such run or checkpoint, or it cannot be read.
    """
    folder = best_run() if str(run) == "best" else runs.find("run", str(run))
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)
    file = Path(checkpoint) if checkpoint not in ("best", "last") else folder / "checkpoints" / f"{checkpoint}.ckpt"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in (folder / "checkpoints").glob("*.ckpt"))) or "none"
        raise ConfigError(f"checkpoint={checkpoint}: {runs.shown(file)} does not exist; there: {there}")
    content = runs.read(file, device="cpu")
    if content.get("format", 1) > FORMAT:
        raise ConfigError(f"{runs.shown(file)} has the format {content['format']}: this version knows {FORMAT}")
    if config.model.get("attention"):  # chosen on the machine that trained it
        config.model.attention = best_attention(torch.device(device).type, config.trainer.precision, 0.0)
    network = build(config, "model")
    weights = {name.removeprefix("network."): weight for name, weight in content["state_dict"].items()}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{runs.shown(file)} does not fit the model of {runs.shown(folder)}: {error}") from error
    with blamed_on("device"):
        network = network.eval().to(device)
    with blamed_on("run"):
        return LoadedRun(network, tokenizer.load(folder / "tokenizer.json"), config, folder, file)


def best_run() -> Path:
    """Return the folder with the lowest best metric, among the runs with the latest one's metric and data."""

    def kind(folder: Path) -> tuple[Any, ...]:
        config = OmegaConf.load(folder / "config.yaml")
        data = {key: config.data.get(key) for key in ("path", "train_path", "val_path", "val_fraction")}
        return config.monitor, *data.values(), config.tokenizer

    latest = kind(runs.find("run", "latest"))
    found = {folder: runs.result_of(folder).get("best") for folder in runs.all_runs()}
    scores = {folder: score for folder, score in found.items() if score is not None and kind(folder) == latest}
    if not scores:
        raise ConfigError("run=best: no run on the latest one's data has come to a best checkpoint")
    return min(scores, key=lambda folder: scores[folder])
