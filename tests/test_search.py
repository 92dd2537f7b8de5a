"""Searches, with runs that are made up: what is proposed, told, gone on with, and stopped early."""

import json
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from conftest import ACCURACY, Jobs, Sweep, refused_sweep
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from language_model.files import write_json
from language_model.runs.config import ConfigError
from language_model.sweeps import summary
from language_model.sweeps.pruning import Pruning
from language_model.sweeps.study import distribution_of, end_values, open_study

SEARCH = ["hydra/sweeper=search", "hydra.sweeper.n_trials=6", "optimizer.lr=tag(log,interval(1e-4,1e-1))"]


def study_of(tmp_path: Path) -> optuna.Study:
    return open_study(tmp_path / "sweep", "min")


@pytest.mark.parametrize(
    ("override", "distribution", "ends_of_it"),
    [
        ("x=interval(0.5,2)", FloatDistribution(0.5, 2.0), ["0.5", "2.0"]),
        ("x=tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True), ["0.0001", "0.01"]),
        ("x=interval(1,8)", FloatDistribution(1.0, 8.0), ["1.0", "8.0"]),
        ("x=int(interval(1,8))", IntDistribution(1, 8), ["1", "8"]),
        ("x=range(2,9)", IntDistribution(2, 8), ["2", "8"]),
        ("x=range(2,9,3)", IntDistribution(2, 8, step=3), ["2", "8"]),
        ("x=choice(learned,rotary)", CategoricalDistribution(["learned", "rotary"]), ["learned", "rotary"]),
        ("x=8,16", CategoricalDistribution(["8", "16"]), ["8", "16"]),
    ],
)
def test_spaces_are_declared_in_hydras_words(override: str, distribution, ends_of_it: list[str]) -> None:
    found = distribution_of(OverridesParser.create().parse_override(override))
    assert found == distribution
    assert end_values(found) == ends_of_it


@pytest.mark.slow  # composes a config for each of 15 trials
def test_a_search_finds_what_is_good(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    jobs.outcome = lambda config: abs(config.optimizer.lr - 0.01) + (config.model.position == "learned")
    said = multirun(*SEARCH, "hydra.sweeper.n_trials=15", "model.position=choice(learned,rotary)", "seed=3")
    assert len(jobs.done) == 15
    assert "15 trials, 0 of them done" in said
    rows = summary.read(tmp_path / "sweep")
    assert set(rows[0].values) == {"trial", "optimizer.lr", "model.position"}
    assert rows[0].values["model.position"] == "rotary"
    assert rows[0].value == pytest.approx(study_of(tmp_path).best_value)
    assert f"optimizer.lr={rows[0].values['optimizer.lr']}" in summary.command(rows[0])  # all its digits


@pytest.mark.slow
def test_a_search_goes_on_as_if_it_had_not_stopped(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    multirun(*SEARCH)
    whole = [trial.params for trial in study_of(tmp_path).trials]
    jobs.done.clear()
    multirun(*SEARCH)
    assert jobs.done == []

    other = f"hydra.sweep.dir={tmp_path / 'other' / 'sweep'}"

    def killed(config) -> float:
        if len(jobs.done) == 4:
            raise KeyboardInterrupt
        return config.optimizer.lr

    jobs.outcome = killed
    with pytest.raises(SystemExit) as stopped:
        multirun(*SEARCH, other)
    assert stopped.value.code == 130
    assert jobs.done == ["trial-0000", "trial-0001", "trial-0002", "trial-0003"]
    jobs.done.clear()
    jobs.outcome = lambda config: config.optimizer.lr
    multirun(*SEARCH, other)
    assert jobs.done == ["trial-0003", "trial-0004", "trial-0005"]  # the one that was broken off comes first
    study = study_of(tmp_path / "other")
    assert [trial.params for trial in study.trials] == whole
    assert all(trial.state.name == "COMPLETE" for trial in study.trials)


def test_a_trial_that_another_process_has_is_left_to_it(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    multirun(*SEARCH, "hydra.sweeper.n_trials=2")
    study = study_of(tmp_path)
    theirs = study.ask({"optimizer.lr": FloatDistribution(1e-4, 1e-1, log=True)}).number
    jobs.done.clear()
    with FileLock(tmp_path / "sweep" / f".trial-{theirs:04}.lock"):
        multirun(*SEARCH, "hydra.sweeper.n_trials=4")
    assert jobs.done == ["trial-0003"]  # theirs counts, too


def test_what_fails_is_told(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    def outcome(config) -> float | str:
        which = len(jobs.done)
        return {2: "OSError: no space left on device", 3: "NonFiniteError: the gradient of step 7"}.get(which, 1.0)

    jobs.outcome = outcome
    message = refused_sweep(multirun, *SEARCH)
    assert "1 of 5 jobs did not finish" in message
    assert [trial.state.name for trial in study_of(tmp_path).trials] == [
        "COMPLETE", "FAIL", "PRUNED", "COMPLETE", "COMPLETE", "COMPLETE",
    ]  # fmt: skip


def test_a_search_for_the_highest_goes_by_the_final_value(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    jobs.best = lambda config: 1 - config.optimizer.lr  # the order of the best values is the reverse
    said = multirun(*SEARCH, *ACCURACY, "hydra.sweeper.n_trials=3")
    study = open_study(tmp_path / "sweep", "max")
    rates = [trial.params["optimizer.lr"] for trial in study.trials]
    assert [trial.value for trial in study.trials] == rates
    assert (study.direction.name, study.best_value) == ("MAXIMIZE", max(rates))
    assert f"optimizer.lr={max(rates)}" in next(line for line in said.splitlines() if line.startswith("best "))
    again = [*SEARCH, *ACCURACY, "hydra.sweeper.n_trials=4", "monitor_mode=min"]
    assert "is another sweep: monitor_mode=(not set) then, min now" in refused_sweep(multirun, *again)
    with pytest.raises(ConfigError, match=r"monitor_mode=min: the search in .* is to maximize; choose another name"):
        open_study(tmp_path / "sweep", "min")


def test_a_search_must_know_what_is_better(multirun: Sweep, jobs: Jobs) -> None:
    own = ["+callbacks.own._target_=conftest.Accuracy", "monitor=train/score"]
    assert "monitor_mode: whether a lower or a higher train/score is better" in refused_sweep(multirun, *SEARCH, *own)


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("trial-0000/result.json", '{"best": "abc"}', "result.json is damaged: best=abc: input should be"),
        ("trial-0000/result.json", '{"status": 5}', "result.json is damaged: status=5: "),
        ("trial-0000/job.json", '{"overrides": 5, "values": {}}', "job.json is damaged: overrides=5: "),
        ("trial-0000/job.json", "{}", "job.json is damaged: overrides is missing"),
        ("sweep.json", '{"asked": {"seed": 1}}', "sweep.json is damaged: asked="),
        ("sweep.json", '{"pruner": {}}', "sweep.json is damaged: asked is missing"),
        ("study.log", "{broken\n{}\n", "study.log cannot be read: "),
        ("study.log", '{"op_code": 99}\n', "study.log cannot be read: "),
    ],
)
def test_a_damaged_file_of_a_search_is_named(
    multirun: Sweep, jobs: Jobs, tmp_path: Path, file: str, content: str, found: str
) -> None:
    multirun(*SEARCH, "hydra.sweeper.n_trials=1")
    (tmp_path / "sweep" / file).write_text(content)
    assert found in refused_sweep(multirun, *SEARCH, "hydra.sweeper.n_trials=2")
    assert (tmp_path / "sweep" / file).read_text() == content


def test_a_pruner_that_is_none_is_not_built(tmp_path: Path) -> None:
    for target in ("os.mkdir", "optuna.pruners._base.BasePruner", "optuna.pruners.os", "optuna.pruners.check"):
        pruner = {"_target_": "optuna.pruners.PatientPruner", "patience": 1}
        pruner["wrapped_pruner"] = {"_target_": target, "path": str(tmp_path / "made")}
        write_json(tmp_path / "sweep.json", {"asked": {}, "pruner": pruner})
        with pytest.raises(ConfigError, match=r"sweep.json: pruner: .* is not one of optuna.pruners: refused"):
            open_study(tmp_path, "min")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ([*SEARCH, "monitor=choice(train/loss_epoch,train/x)"], "a sweep has one monitor"),
        (["hydra/sweeper=search", "seed=1"], "needs a search space"),
        ([*SEARCH, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: input should be greater than 0"),
        ([*SEARCH, "optimizer.lr=interval(-1.0,1.0)"], "optimizer.lr=-1.0: input should be greater than 0"),
        ([*SEARCH, "optimizer.lr=interval(1.0,0.1)"], "hydra/sweeper=search: "),
        ([*SEARCH, "optimizer.lr=tag(log,interval(0.0,0.1))"], "hydra/sweeper=search: "),
        ([*SEARCH, "model.position=choice(learned,sinus)"], "model.position=sinus: "),
        ([*SEARCH, "optimizer.rate=interval(0.1,1.0)"], "optimizer.rate: unknown key"),
        ([*SEARCH, "hydra.sweeper.sampler._target_=optuna.samplers.None"], "hydra.sweeper"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_trial(
    multirun: Sweep, jobs: Jobs, tmp_path: Path, overrides: list[str], found: str
) -> None:  # fmt: skip
    assert found in refused_sweep(multirun, *overrides)
    assert jobs.done == []


def test_another_space_under_the_same_name_is_refused(multirun: Sweep, jobs: Jobs) -> None:
    multirun(*SEARCH, "hydra.sweeper.n_trials=1")
    assert "is another sweep: optimizer.lr=" in refused_sweep(multirun, *SEARCH, "optimizer.lr=interval(0.1,1.0)")


def test_a_trial_that_is_hopeless_is_stopped(tmp_path: Path) -> None:
    pruner = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 2, "n_warmup_steps": 0}
    (tmp_path / "sweep.json").write_text(json.dumps({"asked": {}, "pruner": pruner}))
    study = open_study(tmp_path, "min")
    for value in (1.0, 1.2):
        trial = study.ask()
        trial.report(value, 10)
        study.tell(trial, value)

    def at_step_10(loss: float) -> tuple[bool, dict]:
        folder = tmp_path / "trial"
        folder.mkdir(exist_ok=True)
        number = study.ask().number
        write_json(folder / "job.json", {"overrides": [], "values": {}, "trial": number})
        pruning = Pruning(str(folder), "val/loss", "min")
        trainer = SimpleNamespace(
            is_global_zero=True, world_size=1, global_step=10, should_stop=False, sanity_checking=False,
            callback_metrics={"val/loss": loss}, state=SimpleNamespace(fn="fit"),
        )  # fmt: skip
        pruning.setup(trainer, None, "fit")
        pruning.on_validation_end(trainer, None)
        pruning.on_validation_end(trainer, None)  # again after a resume: reported once
        assert trainer.should_stop == pruning.pruned
        return pruning.pruned, study.trials[number].intermediate_values

    assert at_step_10(0.9) == (False, {10: 0.9})
    assert at_step_10(3.0) == (True, {10: 3.0})


def test_a_run_that_is_no_trial_reports_nothing(tmp_path: Path) -> None:
    pruning = Pruning(str(tmp_path), "val/loss", "min")
    pruning.setup(SimpleNamespace(is_global_zero=True), None, "fit")
    assert not pruning.pruned
