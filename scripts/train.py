"""Train a GPT: plan the run, train as planned, say what came out.

`python scripts/train.py --help` shows every key that can be set.
"""

import os
from typing import cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from language_model.runs.command_line import entry_point
from language_model.runs.config import build


@entry_point("train")
def main(config: DictConfig) -> None:
    """Train once, or with ``-m`` start one of a sweep's jobs in a process of its own."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from language_model.sweeps.job import run_job

        run_job(config)
    else:
        train(config, cast(list[str], OmegaConf.to_container(HydraConfig.get().overrides.task)))


def train(config: DictConfig, overrides: list[str]) -> None:
    """Do one run."""
    from language_model.runs.announce import log_end  # here, so that --help need not wait for lightning
    from language_model.runs.fit import fit
    from language_model.runs.plan import make_plan
    from language_model.sweeps.job import stop_with_parent
    from language_model.terminal import JOB_LABEL, setup_logging

    setup_logging()
    is_job = JOB_LABEL in os.environ
    if is_job:
        stop_with_parent()

    run = make_plan(config, overrides)
    result = fit(run)
    if run.trainer.is_global_zero:
        log_end(run.config, result)
        exercise = build(run.config, "exercise")
        if exercise and not is_job:  # a sweep's exercise takes all its jobs together
            exercise(run.folder, [run.folder])


if __name__ == "__main__":
    main()
