"""Trained runs, loaded from their folders alone."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn

from language_model.data.tokenizer import Tokenizer
from language_model.data.tokenizer_file import load_tokenizer
from language_model.files import display_path, sha256_of
from language_model.runs.config import ConfigError, as_dict, build, errors_for_key
from language_model.runs.folder import all_runs, find_run, read_config, read_settings
from language_model.runs.monitor import BEST, sign_of
from language_model.runs.records import read_result
from language_model.runs.trust import check_offered
from language_model.terminal import log
from language_model.training.checkpoint_file import read_checkpoint
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
        run: its folder or name; ``latest``; or ``best``, the best metric among those measured like the latest run.
        checkpoint: ``best``, ``last``, or a checkpoint file.
        device: where to put the network.
        as_trained: keep the run's own attention, so that its losses come out with the same rounding; else the fastest
            for the device.

    Raises:
        ConfigError: there is no such run or checkpoint, or it cannot be read.
    """
    folder = best_run() if str(run) == "best" else find_run("run", str(run))
    config = read_config(folder)
    check_offered(as_dict(config), display_path(folder / "config.yaml"))
    for key in ("model", "data", "trainer"):
        if not isinstance(config.get(key), DictConfig):
            raise ConfigError(f"{display_path(folder / 'config.yaml')} is damaged, or not a run's config: no {key}")
    file = find_checkpoint(folder, checkpoint)
    content = load_checkpoint(file, "cpu", key="checkpoint")
    if config.model.get("attention") and not as_trained:  # it was chosen for the machine that trained the run
        config.model.attention = best_attention(torch.device(device).type, config.trainer.get("precision"), 0.0)
    weights = {str(name).removeprefix("network."): weight for name, weight in content["state_dict"].items()}
    check_size(config, weights, file)
    network = build(config, "model")
    if not hasattr(network, "max_seq_len"):  # which generation asks for
        network.max_seq_len = config.data.get("seq_len")
    if different := difference(weights, network.state_dict()):
        raise ConfigError(f"checkpoint: {display_path(file)} belongs to another network: {different}")
    network.load_state_dict(weights)
    with errors_for_key("device"):
        network = network.eval().to(device)
    with errors_for_key("run"):
        return LoadedRun(network, load_tokenizer(folder / "tokenizer.json"), config, folder, file)


def check_size(config: DictConfig, weights: dict[str, torch.Tensor], file: Path) -> None:
    """Raise ConfigError for a network of other sizes than the weights, before it takes memory."""
    try:
        with torch.device("meta"):
            network = build(config, "model")
    except ConfigError:
        return  # not every network can be built without memory; then it is compared afterwards
    if different := difference(weights, network.state_dict()):
        raise ConfigError(f"checkpoint: {display_path(file)} belongs to another network: {different}")


def find_checkpoint(folder: Path, checkpoint: str) -> Path:
    """Return the file of a run's checkpoint; ``last`` for ``best``, with a warning, if the run has judged none yet."""
    file = Path(checkpoint) if checkpoint not in ("best", "last") else folder / "checkpoints" / f"{checkpoint}.ckpt"
    owner = file.resolve().parent.parent
    if (owner / "config.yaml").is_file() and owner != folder.resolve():
        raise ConfigError(f"checkpoint={checkpoint}: of another run than {display_path(folder)}: add run={owner}")
    if file.is_file():
        return file
    last = folder / "checkpoints" / "last.ckpt"
    if checkpoint == "best" and last.is_file() and "best" not in read_result(folder):
        log.warning(f"{display_path(file)} does not exist, as the run judged no weights; taking last.ckpt")
        return last
    available = ", ".join(sorted(path.stem for path in last.parent.glob("*.ckpt"))) or "none"
    raise ConfigError(f"checkpoint={checkpoint}: {display_path(file)} does not exist; available: {available}")


def load_checkpoint(checkpoint: Path, device: str = "meta", key: str | None = None) -> dict[str, Any]:
    """Return what a checkpoint of a run holds, tensors on `device` (``meta``: shapes without values).

    ConfigError (naming `key`) if the file does not exist, is damaged, is no checkpoint of a run, or could run code when
    loaded.
    """
    named = f"{key}: " if key else ""
    try:
        content = read_checkpoint(checkpoint, device)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{named}{error}") from error
    kinds = {"global_step": int, "state_dict": dict, "loops": dict}
    if not isinstance(content, dict) or not all(isinstance(content.get(name), kind) for name, kind in kinds.items()):
        raise ConfigError(f"{named}{display_path(checkpoint)} is not a checkpoint of a run")
    content.setdefault("format", 1)
    if not isinstance(content["format"], int) or content["format"] > CHECKPOINT_FORMAT:
        raise ConfigError(
            f"{named}{display_path(checkpoint)} has format {content['format']}: this version reads up to "
            f"{CHECKPOINT_FORMAT}"
        )
    return content


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """Return the first weight, by name, whose shape is another in a checkpoint than in a network; None if none is."""
    shapes = [{name: tuple(getattr(w, "shape", ())) for name, w in weights.items()} for weights in (theirs, ours)]
    for name in sorted(shapes[0].keys() | shapes[1].keys(), key=str):
        there, here = (weights.get(name) for weights in shapes)
        if there != here:
            return f"{name} has the shape {there or 'of no weight'} there and {here or 'of no weight'} here"
    return None


def best_run() -> Path:
    """Return the folder of the run with the best metric of ``best.ckpt``, among those comparable with the latest run.

    Those have its metric, measured on the same share of the same data with the same tokenizer.
    """
    latest = find_run("run", "latest")
    scores: dict[Path, float] = {}
    folders = all_runs()
    wanted = measured_on(latest)
    for folder in folders:
        try:
            score = read_result(folder).get("best")
            if score is not None and measured_on(folder) == wanted:
                scores[folder] = score
        except ConfigError as error:
            log.warning(f"{error}; this run is left out")
    monitor, mode = wanted["monitor"], wanted["monitor_mode"]
    if not scores:
        raise ConfigError(f"run=best: no run has a best checkpoint by {monitor}, measured as in {display_path(latest)}")
    best = min(scores, key=lambda folder: sign_of(mode) * scores[folder])
    log.info(
        f"best     {display_path(best)}: {monitor} {scores[best]:.4f} of best.ckpt, the {BEST[mode]} of "
        f"{len(scores)} runs measured alike; {len(folders) - len(scores)} others are not ranked"
    )
    return best


def measured_on(folder: Path) -> dict[str, Any]:
    """Return all that the metric of a run depends on, besides the network: the metric, the tokens and their share."""
    settings = read_settings(folder)
    share = {key: settings.get(f"trainer.{key}") for key in ("limit_val_batches", "overfit_batches", "fast_dev_run")}
    irrelevant = {"data.cache", "data.num_workers", "data.seed"}
    if not str(settings.get("monitor")).startswith("train/"):
        irrelevant |= {"data.stride"}  # of the training windows
        if share["limit_val_batches"] == 1.0 and not share["overfit_batches"]:
            irrelevant |= {"data.batch_size"}  # the whole split, in batches of any size
    else:
        share["limit_train_batches"] = settings.get("trainer.limit_train_batches")
    data = {key: value for key, value in settings.items() if key.startswith("data.") and key not in irrelevant}
    metric = {key: settings.get(key) for key in ("monitor", "monitor_mode")}
    tokenizer = folder / "tokenizer.json"
    return {**metric, **share, **data, "tokenizer": sha256_of(tokenizer) if tokenizer.is_file() else None}
