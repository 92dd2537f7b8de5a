"""Stopping the trials of a search early, when they look hopeless."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from language_model.runs.folder import read_job
from language_model.sweeps.study import open_study


class Pruning(Callback):
    """Reports a trial's metric to the search, and stops the trial when Optuna's pruner says so.

    Does nothing in a run that is not a trial.

    Args:
        folder: the run's.
        monitor: the metric.
    """

    def __init__(self, folder: str, monitor: str) -> None:
        self.folder = Path(folder)
        self.monitor = monitor
        self.pruned = False
        self._trial: Any = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Find this run's trial in the study."""
        number = read_job(self.folder).get("trial")
        if number is not None and trainer.is_global_zero:
            from optuna.trial import Trial

            study = open_study(self.folder.parent)
            self._trial = Trial(study, study.trials[number]._trial_id)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Report the epoch's mean training loss, if that is the monitored metric."""
        if self.monitor == "train/loss_epoch":
            self._report(trainer, float(pl_module.epoch_loss.value))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Report the metric after a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.monitor in trainer.callback_metrics:
            self._report(trainer, float(trainer.callback_metrics[self.monitor]))

    def _report(self, trainer: L.Trainer, value: float) -> None:
        if self._trial is not None:
            step = trainer.global_step
            if step not in self._trial.storage.get_trial(self._trial._trial_id).intermediate_values:
                self._trial.report(value, step)
            self.pruned = self._trial.should_prune()
        if trainer.world_size > 1:
            self.pruned = trainer.strategy.broadcast(self.pruned)
        trainer.should_stop = trainer.should_stop or self.pruned
