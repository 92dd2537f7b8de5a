"""Trained runs, loaded from their folders alone."""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn

from language_model.data.tokenizer import Tokenizer
from language_model.data.tokenizer_file import load_tokenizer
from language_model.files import display_path
from language_model.runs.config import ConfigError, build, errors_for_key, one_line
from language_model.runs.folder import all_runs, find_run, read_config, read_result
from language_model.terminal import log
from language_model.training.hardware import best_attention
from language_model.training.module import CHECKPOINT_FORMAT


class LoadedRun(NamedTuple):
    """A trained run: its network in eval mode, its tokenizer, its config, its folder, and the checkpoint loaded."""

    network: nn.Module
    tokenizer: Tokenizer
    config: DictConfig
    folder: Path
    checkpoint: Path


def load_run(
    run: str | Path = "latest",
    checkpoint: str = "best",
    device: str | torch.device = "cpu",
    as_trained: bool = False,
) -> LoadedRun:
    """Load a trained run.

    Args:
        run: its folder or name; ``latest``; or ``best``, the lowest metric among the runs on the latest run's data.
        checkpoint: ``best``, ``last``, or a checkpoint file.
        device: where to put the network.
        as_trained: keep the run's own attention, so that its losses come out with the same rounding; else the fastest
            for the device.

    Raises:
        ConfigError: there is no such run or checkpoint, or it cannot be read.
    """
    folder = best_run() if str(run) == "best" else find_run("run", str(run))
    config = read_config(folder)
    file = Path(checkpoint) if checkpoint not in ("best", "last") else folder / "checkpoints" / f"{checkpoint}.ckpt"
    if not file.is_file():
        available = ", ".join(sorted(path.stem for path in (folder / "checkpoints").glob("*.ckpt"))) or "none"
        if checkpoint == "best" and "last" in available:
            available += "; the run ended before its first validation"
        raise ConfigError(f"checkpoint={checkpoint}: {display_path(file)} does not exist; available: {available}")
    content = load_checkpoint(file, device="cpu")
    if content.get("format", 1) > CHECKPOINT_FORMAT:
        raise ConfigError(
            f"{display_path(file)} has format {content['format']}: this version reads up to {CHECKPOINT_FORMAT}"
        )
    if config.model.get("attention") and not as_trained:  # it was chosen for the machine that trained the run
        config.model.attention = best_attention(torch.device(device).type, config.trainer.precision, 0.0)
    network = build(config, "model")
    weights = {name.removeprefix("network."): weight for name, weight in content["state_dict"].items()}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"{display_path(file)} does not fit the model of {display_path(folder)}: {one_line(str(error))}"
        ) from error
    with errors_for_key("device"):
        network = network.eval().to(device)
    with errors_for_key("run"):
        return LoadedRun(network, load_tokenizer(folder / "tokenizer.json"), config, folder, file)


def load_checkpoint(checkpoint: Path, device: str = "meta") -> dict[str, Any]:
    """Return what a checkpoint holds, tensors on `device` (``meta``: shapes without values).

    ConfigError if the file does not exist, is damaged, is no checkpoint of a run, or could run code when loaded.
    """
    name = display_path(checkpoint)
    if not checkpoint.is_file():
        raise ConfigError(f"{name} does not exist")
    try:
        content = torch.load(checkpoint, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise ConfigError(
                f"{name} holds more than numbers and text, which could run code when loaded: refused"
            ) from error
        raise ConfigError(f"{name} is damaged, or not a checkpoint") from error
    except Exception as error:  # torch raises many kinds for damaged files
        raise ConfigError(f"{name} is damaged, or not a checkpoint: {one_line(str(error))[:100]}") from error
    if not isinstance(content, dict) or not {"global_step", "state_dict", "loops"} <= content.keys():
        raise ConfigError(f"{name} is not a checkpoint of a run")
    return content


def best_run() -> Path:
    """Return the folder of the run with the lowest best metric, among those with the latest run's metric and data."""

    def comparable(folder: Path) -> tuple[Any, ...]:
        config = read_config(folder)
        data = {key: config.data.get(key) for key in ("path", "train_path", "val_path", "val_fraction")}
        return config.monitor, *data.values(), config.tokenizer

    latest = comparable(find_run("run", "latest"))
    scores: dict[Path, float] = {}
    for folder in all_runs():
        try:
            score = read_result(folder).get("best")
            if score is not None and comparable(folder) == latest:
                scores[folder] = score
        except ConfigError as error:
            log.warning(f"{error}; this run is left out")
    if not scores:
        raise ConfigError("run=best: no run on the latest run's data has a best checkpoint")
    return min(scores, key=lambda folder: scores[folder])
