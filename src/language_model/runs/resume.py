"""Resuming: where a run continues, which settings may change then, and what is refused."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from language_model.files import ROOT, display_path, modified_time
from language_model.runs.command_line import explain_error, override_key, quote_override
from language_model.runs.config import ConfigError, as_dict, errors_for_key, flatten
from language_model.runs.folder import find_run, lock_folder, read_settings, read_yaml
from language_model.runs.load import difference, load_checkpoint
from language_model.runs.moved_names import with_current_names
from language_model.runs.records import read_result
from language_model.runs.trust import check_offered, check_overrides, stay_in_folder
from language_model.terminal import log
from language_model.training.module import LanguageModel

# How a run is computed and watched, and how long it is, may change when it resumes; what it computes may not.
CAN_CHANGE_ON_RESUME = (
    "name", "folder", "resume", "compile", "model.attention", "optimizer.fused", "total_steps", "schedule.total_steps",
    "cooldown_start",
    "trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "trainer.accelerator", "trainer.devices",
    "trainer.num_nodes", "trainer.strategy", "trainer.log_every_n_steps", "trainer.enable_*", "trainer.detect_anomaly",
    "trainer.benchmark", "trainer.default_root_dir", "data.num_workers", "data.cache", "logger.*",
    "callbacks.last.*", "callbacks.every.*", "callbacks.*.dirpath", "callbacks.best._target_",
    "callbacks.console.*", "callbacks.sample.*",
    "callbacks.dashboard.*", "callbacks.pruning.*", "callbacks.throughput.*", "callbacks.gradient_norm.*",
)  # fmt: skip

# Settings that are derived from others while they are null.
DERIVED = (
    "vocab_size", "*.vocab_size", "monitor", "*.monitor", "monitor_mode", "callbacks.*.mode",
    "callbacks.*_on_train_epoch_end", "trainer.precision", "model.attention", "optimizer.fused", "compile",
)  # fmt: skip

# What ends a run: with others, a finished run goes on.
LIMITS = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "callbacks.early_stopping.patience")

COMPLETED = ("finished", "pruned")  # the statuses of runs that do not resume


class PreviousRun(NamedTuple):
    """What a run left in its folder when it ended: settings with dotted keys, result, and where it can resume.

    `content` is what that checkpoint holds, tensors without values.
    """

    settings: dict[str, Any]
    result: dict[str, Any]
    checkpoint: Path
    content: dict[str, Any]


def can_change_on_resume(key: str) -> bool:
    """Whether a setting may differ when a run resumes."""
    return any(fnmatch(key, pattern) for pattern in CAN_CHANGE_ON_RESUME)


def resolve_resume(config: DictConfig, typed: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """Return the config of the run that is meant, and its overrides.

    With ``resume=<a run>`` these are that run's own, with the typed overrides on top; else the config as it is.
    """
    typed = [override for override in typed if override_key(override) != "folder"]
    if config.resume is None or Path(str(config.resume)).is_file():
        return config, typed
    folder = find_run("resume", str(config.resume))
    typed = [override for override in typed if override_key(override) not in ("resume", "name")]
    file = folder / "overrides.yaml"
    saved = with_current_names([str(override) for override in read_yaml(file) or []])
    kept = [old for old in saved if override_key(old) not in map(override_key, typed)]
    check_overrides(kept, file)
    overrides = [*kept, *typed]
    config = compose(overrides)
    check_offered(as_dict(config), display_path(file), typed)
    config.folder = str(folder)
    stay_in_folder(config, folder, file, typed)
    return config, overrides


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return a run's config from ``conf/train.yaml`` and overrides, in a script or in a notebook.

    ConfigError for an override that is wrong.
    """
    overrides = [quote_override(override) for override in overrides]
    name = str(HydraConfig.get().job.config_name) if HydraConfig.initialized() else "train"
    try:
        if GlobalHydra.instance().is_initialized():
            return hydra.compose(name, overrides)
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return hydra.compose(name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_error(error, name, overrides)) from error


def find_previous_run(folder: Path) -> PreviousRun | None:
    """Return what a run left in its folder; None if the run is new.

    Locks the folder, and removes what an interrupted save left in it. ConfigError if the folder is of another kind, or
    has no checkpoint that can be read.
    """
    checkpoints = folder / "checkpoints"
    if not folder.exists() or (rank_zero_only.rank and not (checkpoints / "last.ckpt").exists()):
        return None
    if not any((folder / name).is_file() for name in ("config.yaml", "job.json", ".lock")):
        raise ConfigError(f"name: {display_path(folder)} exists and is not a run's folder; choose another name")
    if rank_zero_only.rank == 0:
        with errors_for_key("folder"):
            lock_folder(folder)  # and only then look: another process may have been writing here
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"folder: {display_path(folder)} has a link that leads out of it, {path.name}: refused")
    if not (folder / "config.yaml").is_file():
        return None  # a sweep has prepared the folder, or a run was killed before it wrote its settings
    if rank_zero_only.rank == 0:
        remove_partial_saves(folder)
    result = read_result(folder)
    has_steps = result.get("steps") or (folder / "metrics.csv").exists() or list(checkpoints.glob("*.ckpt"))
    if not has_steps:
        log.info(f"{display_path(folder)} ended before its first step: it starts again")
        return None
    return PreviousRun(read_settings(folder), result, *newest_good_checkpoint(folder))


def newest_good_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return ``last.ckpt``, or if it is damaged the newest other checkpoint, and what it holds.

    ConfigError if none can be read.
    """
    last = folder / "checkpoints" / "last.ckpt"
    others = sorted(last.parent.glob("*.ckpt"), key=modified_time, reverse=True)
    errors = []
    for file in (last, *(file for file in others if file != last)):
        try:
            content = load_checkpoint(file)
        except ConfigError as error:
            errors.append(str(error))
            continue
        for message in errors:
            log.warning(f"{message}; resuming from {display_path(file)}")
        return file, content
    raise ConfigError(
        f"{'; '.join(errors)}: no checkpoint to resume from; remove {display_path(folder)} to start again"
    )


def remove_partial_saves(folder: Path) -> None:
    """Remove what an interrupted save left; a checkpoint that lightning saved on SLURM's signal becomes last.ckpt."""
    last = folder / "checkpoints" / "last.ckpt"
    for partial in last.parent.glob("*.partial"):
        partial.unlink()
    for requeued in sorted(folder.glob("hpc_ckpt_*.ckpt"), key=modified_time):
        if not last.exists() or modified_time(last) < modified_time(requeued):
            requeued.replace(last)
        else:
            requeued.unlink()  # lightning would prefer it to any newer checkpoint


def limits(config: DictConfig) -> dict[str, Any]:
    """Return the settings that end a run."""
    return {key: OmegaConf.select(config, key) for key in LIMITS}


def is_finished(result: dict[str, Any], settings: dict[str, Any], config: DictConfig) -> bool:
    """Whether a run with this result and these settings has reached the end that the config asks for."""
    reached = result.get("limits") or {key: settings.get(key) for key in LIMITS}  # not in results of older runs
    return reached == limits(config) and result.get("status") in COMPLETED


def check_same_settings(folder: Path, before: dict[str, Any], config: DictConfig, derived: bool = True) -> None:
    """Raise ConfigError if a setting differs that would make the resumed run another run.

    Args:
        folder: the run's.
        before: its settings, with dotted keys.
        config: what is asked for now.
        derived: whether derived settings are filled in in `config`; if not, null ones are not compared.
    """
    now = flatten(as_dict(config))
    one_sided = {callback(key) for key in before} ^ {callback(key) for key in now}  # added, or taken away
    if not derived:
        now |= {k: before[k] for k in now if now[k] is None and k in before and any(fnmatch(k, d) for d in DERIVED)}
        warmup, total = "schedule.warmup_steps", before.get("total_steps")
        if total is not None and now.get(warmup, 0) > total:  # it was shortened, if it was not typed
            now[warmup] = before.get(warmup)
    changed = [
        f"{key}={before.get(key, 'nothing')} then, {now.get(key, 'nothing')} now"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key) and not can_change_on_resume(key) and callback(key) not in one_sided
    ]
    if changed:
        more = f", and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ConfigError(
            f"{display_path(folder)} was trained with other settings: {'; '.join(changed[:4])}{more}; "
            f"choose another name, or resume with its own settings by resume={display_path(folder)}"
        )


def callback(key: str) -> str | None:
    """Return the callback that a key belongs to, as ``callbacks.sample``; None for other keys."""
    group, _, rest = key.partition(".")
    return f"{group}.{rest.partition('.')[0]}" if group == "callbacks" and "." in rest else None


def check_checkpoint_fits(
    checkpoint: Path, content: dict[str, Any], module: LanguageModel, steps: int | None, is_own: bool
) -> int:
    """Return the steps that a checkpoint was trained for.

    ConfigError if it is of another network or tokenizer, or leaves no step of those that are asked for.

    Args:
        checkpoint: the file.
        content: what it holds.
        module: the network and the tokenizer of this run.
        steps: optimizer steps of this run; None for no limit.
        is_own: whether this run saved it: then it may have all the steps, and the rest of the run is left to do.
    """
    done: int = content["global_step"]
    if different := difference(content["state_dict"], module.state_dict()):
        raise ConfigError(f"resume: {display_path(checkpoint)} belongs to another network: {different}")
    if content.get("tokenizer", module.tokenizer.fingerprint) != module.tokenizer.fingerprint:
        raise ConfigError(
            f"resume: {display_path(checkpoint)} was trained with another tokenizer; use the same text, or "
            "tokenizer=file tokenizer.path=<that run's folder>/tokenizer.json"
        )
    if steps is not None and (done > steps or (done == steps and not is_own)):
        raise ConfigError(
            f"resume: {display_path(checkpoint)} was trained for {done:,} steps already, and the run ends at "
            f"{steps:,}; set a larger trainer.max_epochs or trainer.max_steps"
        )
    return done
