"""The validation after a run's last step, which Lightning has only where the intervals happen to end."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class FinalValidation(Callback):
    """Validates at the end of training, if a callback ended the run at the end of an epoch, where none was due.

    It is the first callback, so that what the others write and save at the end has the validation.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Validate, unless the last step was validated."""
        if trainer.enable_validation and pl_module.validated_step != trainer.global_step:
            validate_after_the_epoch(trainer)


def ends_with_this_batch(trainer: L.Trainer) -> bool:
    """Whether the run ends when the batch that was just trained on is done."""
    last_epoch = trainer.max_epochs != -1 and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    stopped = trainer.should_stop and trainer.fit_loop._can_stop_early  # by a callback, or by max_time
    return last_step or stopped or (last_epoch and trainer.is_last_batch)


def validate_after_this_batch(trainer: L.Trainer) -> None:
    """Make Lightning validate when this batch is done, if the run validates at all; not twice, if it is due anyway."""
    trainer.val_check_batch = 1  # Lightning's own copies of the intervals
    if trainer.check_val_every_n_epoch is not None:
        trainer.check_val_every_n_epoch = 1


def validate_after_the_epoch(trainer: L.Trainer) -> None:
    """Validate now, at the end of training, and log it at the last step."""
    loop = trainer.fit_loop.epoch_loop
    trainer.validating = True
    loop._batches_that_stepped -= 1  # as Lightning does for what is logged at the end of an epoch
    loop.val_loop.run()
    loop._batches_that_stepped += 1
    trainer.training = True
