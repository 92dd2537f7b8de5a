"""The monitored metric: which one it is, whether lower or higher is better, and that it is logged."""

from typing import Any, Literal

import lightning as L
import yaml
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig, OmegaConf

from language_model.data.datamodule import TokenData
from language_model.files import ROOT
from language_model.runs.config import ConfigError, did_you_mean
from language_model.training.schedule import limit_that_counts

Mode = Literal["min", "max"]

VALIDATION_METRICS = ("val/loss", "val/perplexity", "val/bits_per_byte")
TRAINING_METRIC = "train/loss_epoch"

# Whether callbacks of Lightning's look at their metric at the end of an epoch; else at the end of a validation.
ON_EPOCH_END = ("save_on_train_epoch_end", "check_on_train_epoch_end")

BETTER = {"min": "lower", "max": "higher"}
BEST = {"min": "lowest", "max": "highest"}


def choose_monitor(config: DictConfig, data: TokenData) -> None:
    """Fill in the monitored metric (val/loss if the run validates, else train/loss_epoch), and its mode.

    ConfigError for a metric that nothing logs, here or for one callback, or whose mode is not known or not possible.
    """
    validates = data.has_validation and limit_that_counts(config.trainer, "val")[1] != 0
    known = [*VALIDATION_METRICS, TRAINING_METRIC] if validates else [TRAINING_METRIC]
    groups = ("val/", "train/") if validates else ("train/",)
    allowed = groups if has_own_callback(config) else ()  # which may log any metric
    config.monitor = config.monitor or known[0]
    for key, metric in monitored(config).items():
        if metric is None:
            raise ConfigError(f"{key}=null: a metric is needed; to switch this off: {key.rpartition('.')[0]}=null")
        if metric not in known and not metric.startswith(allowed):
            words = f"no callback logs it; a callback of your own can, as {' or '.join(f'{g}...' for g in groups)}"
            raise ConfigError(f"{key}={metric}: {words}{did_you_mean(metric, known)}")
    config.monitor_mode = choose_mode("monitor_mode", config.monitor, config.monitor_mode)
    often = (config.trainer.val_check_interval, config.trainer.check_val_every_n_epoch) != (1.0, 1)
    for name, node in config.callbacks.items():
        if node and {"monitor", "mode"} <= node.keys():
            inherited = OmegaConf.is_interpolation(node, "mode") and node.monitor != config.monitor
            node.mode = choose_mode(f"callbacks.{name}.mode", node.monitor, None if inherited else node.mode)
            for key in [key for key in ON_EPOCH_END if key in node and node[key] is None]:
                # With validations at other times, Lightning would look at these, and find the last epoch's value.
                node[key] = True if often and validates and node.monitor.startswith("train/") else None


def monitored(config: DictConfig) -> dict[str, str]:
    """Return the metrics that are monitored, by the keys that name them; each metric once."""
    found: dict[str, str] = {"monitor": config.monitor}
    for name, node in config.callbacks.items():
        if node and "monitor" in node and node.monitor not in found.values():
            found[f"callbacks.{name}.monitor"] = node.monitor
    return found


def choose_mode(key: str, metric: str, mode: Mode | None) -> Mode:
    """Return a metric's mode; ConfigError if it is neither given nor known, or contradicts what is known."""
    known = known_mode(metric)
    if (mode or known) is None:
        raise ConfigError(f"{key}: whether a lower or a higher {metric} is better is not known; type {key}=min or max")
    if mode == "max" and metric in (*VALIDATION_METRICS, TRAINING_METRIC):
        raise ConfigError(f"{key}=max: a lower {metric} is better; allowed: min, null")
    return mode or known  # type: ignore[return-value]  # not None


def known_mode(metric: str) -> Mode | None:
    """Return whether lower (min) or higher (max) is better, as far as the metric's name says."""
    if any(word in metric for word in ("loss", "perplexity", "bits", "error")):
        return "min"
    return "max" if "accuracy" in metric else None


def sign_of(mode: str) -> int:
    """Return the factor with which a lower value of a metric is better: 1 for min, -1 for max."""
    return -1 if mode == "max" else 1


def final_name(metric: str) -> str:
    """Return what a metric's value at the end of a run is called: a validation's is that of the final weights."""
    return f"{metric} of the final weights" if metric.startswith("val/") else f"{metric} at the end of the run"


def best_name(metric: str) -> str:
    """Return what a metric's best value in a run is called."""
    return f"best of the run's {'validations' if metric.startswith('val/') else 'epochs'}"


def has_own_callback(config: DictConfig) -> bool:
    """Whether a config has callbacks besides those of ``conf/callbacks/default.yaml``."""
    defaults = yaml.safe_load((ROOT / "conf" / "callbacks" / "default.yaml").read_text(encoding="utf-8"))
    targets = {node["_target_"] for node in defaults.values()}
    return any(node and node.get("_target_") not in targets for node in config.callbacks.values())


class MonitorCheck(Checkpoint):
    """Ends the run with one line if a monitored metric was not logged when it was due.

    That is at the end of a validation for ``val/...``, of an epoch for ``train/...``. It is a Checkpoint because
    Lightning calls these last, when the module and all other callbacks have logged theirs.

    Args:
        metrics: by the keys that name them.
    """

    def __init__(self, metrics: dict[str, str]) -> None:
        self.metrics = metrics

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look for the metrics of the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look_for("val/", trainer, "the first validation")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look for the metrics of the epoch."""
        if pl_module.epoch_is_complete:
            self._look_for("train/", trainer, "the first epoch")

    def _look_for(self, group: str, trainer: L.Trainer, when: str) -> None:
        logged = [name for name in trainer.callback_metrics if "/" in name]
        for key, metric in self.metrics.items():
            if metric.startswith(group) and metric not in logged:
                raise ConfigError(f"{key}={metric}: not logged by the end of {when}; logged: {', '.join(logged)}")
