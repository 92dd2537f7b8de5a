"""The command line of the scripts: Hydra composes a config from it, and every mistake becomes one line."""

import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from language_model.files import ROOT
from language_model.runs.config import ConfigError, did_you_mean, explain_interpolation, flatten, one_line

CONF = ROOT / "conf"

# Keys of nanoGPT and lightning-hydra-template, and what they are called here.
KEYS_ELSEWHERE = {
    "batch_size": "data.batch_size",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "block_size": "model.max_seq_len",
    "dataset": "data",
    "device": "trainer.accelerator",
    "dtype": "trainer.precision",
    "eval_interval": "trainer.val_check_interval",
    "eval_iters": "trainer.limit_val_batches",
    "grad_clip": "trainer.gradient_clip_val",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "init_from": "resume",
    "learning_rate": "optimizer.lr",
    "log_interval": "trainer.log_every_n_steps",
    "lr_decay_iters": "total_steps",
    "max_iters": "trainer.max_steps, with trainer.max_epochs=-1",
    "epochs": "trainer.max_epochs",
    "eval_only": "scripts/evaluate.py",
    "gpus": "trainer.devices",
    "optimized_metric": "monitor",
    "wandb_log": "a file conf/logger/wandb.yaml: docs/extend.md has it",
    "n_embd": "model.d_model",
    "n_head": "model.n_heads",
    "n_layer": "model.n_layers",
    "out_dir": "name",
    "start": "prompt",
    "warmup_iters": "schedule.warmup_steps",
    "ckpt_path": "resume, a run or a checkpoint file",
    "debug": "trainer.fast_dev_run=true, one batch without a run folder",
    "hparams_search": "hydra/sweeper=search",
    "task_name": "name",
    "test": "scripts/evaluate.py, after training",
    "train": "scripts/train.py to train, scripts/evaluate.py to evaluate",
}

# The same for the scripts that take a trained run.
KEYS_OF_TRAINED_RUNS = {"ckpt_path": "checkpoint", "init_from": "run", "out_dir": "run", "device": "accelerator"}

# Choices of lightning-hydra-template, and how the same is done here.
CHOICES_ELSEWHERE = {
    "callbacks=none": "callbacks.<name>=null, which switches one off",
    "logger=csv": "logger=default, which writes metrics.csv and TensorBoard's files",
    "logger=tensorboard": "logger=default, which writes TensorBoard's files and metrics.csv",
    "logger=wandb": "a file conf/logger/wandb.yaml: docs/extend.md has it",
    "trainer=cpu": "trainer.accelerator=cpu",
    "trainer=ddp": "trainer.devices=2 trainer.strategy=ddp",
    "trainer=gpu": "trainer.accelerator=gpu",
    "trainer=mps": "trainer.accelerator=mps",
}

# The packages of Hydra's launchers.
LAUNCHERS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    "submitit_local": "hydra-submitit-launcher",
}

# Environment variable of the processes that print an error as one line, though HYDRA_FULL_ERROR is set.
ONE_LINE = "LANGUAGE_MODEL_ONE_LINE"

# The options that Hydra has; all else is key=value.
OPTIONS = (
    "-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-r", "--run", "-m",
    "--multirun", "-sc", "--shell-completion", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
    "--experimental-rerun", "-i", "--info",
)  # fmt: skip


def entry_point(
    config_name: str, literal: tuple[str, ...] = ()
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Return a decorator that makes a function of a config a script's entry point.

    Hydra composes the config from ``conf/<config_name>.yaml`` and the command line. A ConfigError, or a command line
    that Hydra refuses, ends the script with one line on stderr and exit status 1 (HYDRA_FULL_ERROR=1 adds the
    traceback); Ctrl-C ends it with status 130.

    Args:
        config_name: file in ``conf``, without the suffix.
        literal: keys whose values are taken as text, whatever characters they contain.
    """

    # Lightning's further processes inherit it from the one that sets it below.
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR", "0") != "0" and ONE_LINE not in os.environ

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(task)
        def job(config: DictConfig) -> None:
            run_task(task, config, traceback_wanted)

        hydra_main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)

        def main() -> None:
            sys.argv[1:] = prepare_arguments(sys.argv[1:], literal)
            if traceback_wanted:
                hydra_main()
            else:
                run_hydra(hydra_main, config_name)

        return main

    return decorate


def run_hydra(hydra_main: Callable[[], None], config_name: str) -> None:
    """Run Hydra's main function; its errors, and those of a sweep, end the process with one line."""
    os.environ |= {"HYDRA_FULL_ERROR": "1", ONE_LINE: "1"}  # makes Hydra raise instead of printing several lines
    try:
        hydra_main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ConfigError, HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        if type(error) is ValueError and "Config group override" not in str(error):  # a fault in the code
            raise
        sys.exit(f"error: {explain_error(error, config_name, sys.argv[1:])}")
    finally:
        os.environ["HYDRA_FULL_ERROR"] = "0"
        del os.environ[ONE_LINE]


def run_task(task: Callable[[DictConfig], None], config: DictConfig, traceback_wanted: bool) -> None:
    """Run a script's task; a ConfigError ends the process with its line, in a sweep only the job."""
    try:
        task(config)
    except ConfigError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            print(f"error: {error}", file=sys.stderr)
            raise  # the sweep continues with its other jobs and ends with the first error
        if traceback_wanted:
            raise
        sys.exit(1 if int(os.environ.get("LOCAL_RANK", "0")) else f"error: {error}")  # the first process says it


def prepare_arguments(arguments: Sequence[str], literal: tuple[str, ...]) -> list[str]:
    """Return the command line as Hydra can read it; exit with one line for an option such as ``--batch_size=32``."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("-") and name not in OPTIONS:
            key = name.lstrip("-").replace("-", "_")
            here = KEYS_ELSEWHERE.get(key, key)
            sys.exit(f"error: {argument}: settings are written without dashes, as {here.split(',')[0]}=...")
    multirun = [argument for argument in arguments if argument in ("-m", "--multirun")]  # argparse wants it first
    return [*multirun, *(quote_override(argument, literal) for argument in arguments if argument not in multirun)]


def quote_override(argument: str, literal: tuple[str, ...] = ()) -> str:
    """Return an override with its value quoted if its key is `literal` or Hydra's grammar cannot parse the value."""
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return argument
    if key not in literal:
        try:
            OverridesParser.create().parse_override(argument)
            return argument
        except HydraException:
            pass
    inner = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), value)
    return f"{key}='{inner}'"


def override_key(override: str) -> str:
    """Return the key that an override sets."""
    return override.split("=")[0].lstrip("+~")


def explain_error(error: Exception, config_name: str, arguments: Sequence[str]) -> str:
    """Return one line for an error of Hydra's, with what is allowed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return explain_missing_file(error)
    if isinstance(error, OmegaConfBaseException):
        return explain_interpolation(error)
    nulls = [a for a in arguments if a.endswith("=null") and (CONF / a.removesuffix("=null")).is_dir()]
    if nulls and "Config group override must be" in str(error):
        group = nulls[0].removesuffix("=null")
        return f"{nulls[0]}: a file of conf/{group} is needed; choose from {', '.join(choices(group))}"
    if isinstance(error, OverrideParseException):
        quoted = "settings are written key=value, with quotes around a value with spaces"
        return f"{error.override}: {one_line(str(error).split(' See https')[0]) if '=' in error.override else quoted}"
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    explained = explain_unknown_key(unknown[1], config_name, arguments) if unknown else None
    return explained or one_line(str(error))


def explain_missing_file(error: MissingConfigException) -> str:
    """Return one line for a choice that is no file of ``conf``."""
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if choice in LAUNCHERS:
        return f"hydra/launcher={choice}: not installed; pip install {LAUNCHERS[choice]}"
    if elsewhere := CHOICES_ELSEWHERE.get(f"{group}={choice}"):
        return f"{group}={choice}: there is no such file in conf/{group}; here it is {elsewhere}"
    if not group:
        return f"--config-name={choice}: there is no conf/{Path(choice).stem}.yaml; without this option it is right"
    options = error.options or choices(group)
    return f"{group}={choice}: there is no such file in conf/{group}; choose from {', '.join(sorted(options))}"


def explain_unknown_key(key: str, config_name: str, arguments: Sequence[str]) -> str | None:
    """Return one line for a key that no config has; None if the mistake is in a file of ``conf``."""
    if key.endswith("._target_"):
        return f"{key}: there is no such node yet; a + in front adds it: +{key}=..."
    groups = [a.split(",")[0] for a in arguments if (CONF / a.partition("=")[0]).is_dir() and "=" in a]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            known = hydra.compose(config_name, groups)
    except HydraException:
        return None
    parent, _, name = key.rpartition(".")
    siblings = OmegaConf.select(known, parent) if parent else known
    elsewhere = KEYS_ELSEWHERE if "trainer" in known else KEYS_OF_TRAINED_RUNS
    if name in elsewhere:
        return f"{key}: unknown key; here it is {elsewhere[name]}"
    same_name = [other for other in flatten(OmegaConf.to_container(known)) if other.endswith(f".{name}")]
    return f"{key}: unknown key{did_you_mean(name, siblings or (), same_name)}"


def choices(group: str) -> list[str]:
    """Return the files of a group of ``conf``, without the suffix."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))
