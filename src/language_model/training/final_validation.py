"""The validation after a run's last step, which Lightning has only where the intervals happen to end."""

import lightning as L


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
