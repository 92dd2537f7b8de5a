"""Stopping the trials of a search early, when they look hopeless."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from language_model.runs.records import read_job
from language_model.sweeps.study import open_study


class Pruning(Checkpoint):
    """Reports a trial's metric to the search, and stops the trial when Optuna's pruner says so.

    Does nothing in a run that is not a trial. It is a Checkpoint because Lightning calls these last, when the module
    and all other callbacks have logged their metrics.

    Args:
        folder: the run's.
        monitor: the metric.
        mode: whether a lower (min) or a higher (max) value is better.
    """

    def __init__(self, folder: str, monitor: str, mode: Literal["min", "max"]) -> None:
        self.folder = Path(folder)
        self.monitor = monitor
        self.mode = mode
        self.pruned = False
        self._trial: Any = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Find this run's trial in the study, if it is in a search's folder."""
        number = read_job(self.folder).get("trial")
        if number is not None and trainer.is_global_zero and (self.folder.parent / "study.log").is_file():
            from optuna.trial import Trial

            study = open_study(self.folder.parent, self.mode)
            if number < len(study.trials):
                self._trial = Trial(study, study.trials[number]._trial_id)

    def state_dict(self) -> dict[str, Any]:
        """Return whether the trial was pruned, for a run that was killed after that."""
        return {"pruned": self.pruned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.pruned = state_dict["pruned"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Forget that a trial which now goes on was pruned before."""
        self.pruned = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Report the metric, if it is logged at the end of an epoch."""
        if not self.monitor.startswith("val/") and pl_module.epoch_is_complete:
            self._report(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Report the metric, if it is logged by a validation."""
        if self.monitor.startswith("val/") and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._report(trainer)

    def _report(self, trainer: L.Trainer) -> None:
        if self._trial is not None:
            step, value = trainer.global_step, float(trainer.callback_metrics[self.monitor])
            if step not in self._trial.storage.get_trial(self._trial._trial_id).intermediate_values:
                self._trial.report(value, step)
            self.pruned = self._trial.should_prune()
        if trainer.world_size > 1:
            self.pruned = trainer.strategy.broadcast(self.pruned)
        trainer.should_stop = trainer.should_stop or self.pruned
