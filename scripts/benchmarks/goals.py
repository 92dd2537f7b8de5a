"""Measure this project against its goals, each next to its reference, in turns on the same machine.

The goals: time to nanoGPT's loss, the loss after a given time, the overhead of Lightning and of the optimizer, the
start-up time. The recipes are those of ``conf/experiment``. A run is ``scripts/train.py`` as a user starts it, in a
process of its own, with logging and checkpoints; its loss is over the whole validation split, with the weights of the
last step, and so is that of nanoGPT beside it. A goal that this machine cannot measure is reported as "n/a".
"""

import csv
import hashlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import (
    BENCHMARKS,
    log_figures,
    median_text,
    range_text,
    run_in_new_process,
    save_figures,
    time_train_script,
    train,
)
from nanogpt import run_nanogpt, split_tokens
from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveInt
from torch.nn.utils import clip_grad_norm_

from language_model.data.text_files import download
from language_model.files import ROOT
from language_model.runs.command_line import entry_point
from language_model.runs.config import ConfigError, build, check_values, errors_for_key
from language_model.training.hardware import describe_device, device_type

TINY_SHAKESPEARE = OmegaConf.load(ROOT / "conf" / "data" / "tinyshakespeare.yaml")
CPU = "trainer.accelerator=cpu"
TINY = ["model.d_model=8", "model.n_heads=1", "model.n_layers=1", "model.d_ff=16", "model.max_seq_len=8"]
TINY += ["data.batch_size=4"]
SHORT = ["trainer.max_steps=100", "trainer.val_check_interval=100"]
KEYS = {"goals": list[int], "rounds": PositiveInt, "path": str | None, "nanogpt": str | None, "table": str | None}
Row = tuple[int, str, str, str, str]
COLUMNS = ("goal", "what", "wanted", "reached", "spread")


@entry_point("benchmark_goals")
def main(config: DictConfig) -> None:
    """Measure the given goals, print a table and save the figures."""
    goals: dict[int, Callable[[DictConfig], list[Row]]] = {
        1: time_to_loss, 2: time_to_loss, 3: partial(recipe_loss, 3), 4: partial(recipe_loss, 4),
        5: partial(recipe_loss, 5), 6: lightning_overhead, 7: optimizer_share, 8: gpu_utilization, 9: startup_time,
    }  # fmt: skip
    check_values(config, KEYS)
    unknown = [goal for goal in config.goals if goal not in goals]
    if unknown or not config.goals:
        raise ConfigError(f"goals={list(config.goals)}: there are 1 to 9")
    if config.path is None and min(config.goals) < 8:
        config.path = str(download(TINY_SHAKESPEARE.url, TINY_SHAKESPEARE.sha256, ROOT / "outputs" / "corpora"))
    for key, path in (("path", config.path), ("nanogpt", config.nanogpt and f"{config.nanogpt}/train.py")):
        if path and not Path(path).is_file():
            raise ConfigError(f"{key}: {path} does not exist")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    machine = f"{date.today()}, {describe_device(device)}, {config.rounds} rounds"
    if min(config.goals) < 8:
        config.path = str(Path(config.path).resolve())
        with errors_for_key("path"):
            train_tokens, val_tokens, vocab_size = split_tokens(config.path)
        size = f"{len(train_tokens) + len(val_tokens):,} characters, {vocab_size} different ones"
        machine += f", {Path(config.path).name} ({size})"
    rows: list[Row] = []
    for measure in dict.fromkeys(goals[goal] for goal in config.goals):
        rows += [row for row in measure(config) if row[0] in config.goals]
        figures = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        save_figures(BENCHMARKS / "goals.json", {"machine": machine, "figures": figures})
        table = f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|\n"
        table += "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
        if config.table:
            Path(config.table).write_text(f"{machine}:\n\n{table}", encoding="utf-8")
    print(f"\n{machine}\n\n{table}\nfigures in {BENCHMARKS / 'goals.json'}")


def time_to_loss(config: DictConfig) -> list[Row]:
    """Goals 1 and 2: the time to nanoGPT's loss at its context, of the steps and of the whole command."""
    theirs, ours = [], []
    for i in range(config.rounds):
        theirs.append(log_figures("nanoGPT", run_nanogpt(config.path, config.nanogpt)))
        run = train("experiment=shakespeare_cpu_64", CPU, f"data.path={config.path}", f"seed={i}")
        ours.append(log_figures("this project", run))
    losses = [run["loss"] for run in ours]
    their_loss = statistics.mean(run["loss"] for run in theirs)
    missed = "" if statistics.mean(losses) <= their_loss else ", not reached"
    loss = f"{mean_text(losses)}{missed} against {their_loss:.4f}"
    rows: list[Row] = []
    for goal, what, key, wanted in (
        (1, "steps only", "training_seconds", 0.1),
        (2, "the whole command", "command_seconds", 0.2),
    ):
        ratios = [o[key] / t[key] for o, t in zip(ours, theirs, strict=True)]
        medians = [median_text([run[key] for run in runs], ".1f") for runs in (ours, theirs)]
        spread = f"{range_text(ratios)}; {medians[0]} s over {medians[1]} s; val/loss {loss}"
        what = f"time to nanoGPT's loss at context 64, {what}, over nanoGPT's"
        rows.append((goal, what, f"≤ {wanted}", median_text(ratios), spread))
    return rows


def recipe_loss(goal: int, config: DictConfig) -> list[Row]:
    """Goals 3 to 5, for tiny Shakespeare: the loss that a recipe reaches over several seeds, and its time."""
    name, wanted = {
        3: ("shakespeare_cpu", "loss ≤ 1.50 in nanoGPT's time for the whole command"),
        4: ("shakespeare_cpu_long", "loss ≤ 1.4697 in ≤ 300 s"),
        5: ("shakespeare_cpu_hour", "loss ≤ 1.42 in ≤ 3,600 s"),
    }[goal]
    if hashlib.sha256(Path(config.path).read_bytes()).hexdigest() != TINY_SHAKESPEARE.sha256:
        wanted = "no goal for this text"
    runs, references = [], []
    for i in range(config.rounds):
        if goal == 3:
            references.append(log_figures("nanoGPT", run_nanogpt(config.path, config.nanogpt)))
        runs.append(log_figures(name, train(f"experiment={name}", CPU, f"data.path={config.path}", f"seed={i}")))
    losses = [run["loss"] for run in runs]
    seconds = [run["command_seconds"] for run in runs]
    spread = f"whole command {median_text(seconds)} s ({range_text(seconds)})"
    spread += f", steps {median_text([run['training_seconds'] for run in runs])} s"
    if references:
        spread += f"; nanoGPT {statistics.mean(run['loss'] for run in references):.4f}"
        spread += f" in {median_text([run['command_seconds'] for run in references])} s"
    return [(goal, f"`experiment={name}`", wanted, mean_text(losses), spread)]


def mean_text(losses: list[float]) -> str:
    """Return the mean and the standard deviation of some losses as text."""
    deviation = statistics.stdev(losses) if len(losses) > 1 else math.nan
    return f"{statistics.mean(losses):.4f} ± {deviation:.4f}"


def lightning_overhead(config: DictConfig) -> list[Row]:
    """Goal 6: a run's steps against a plain loop over the same batches, network, optimizer and schedule."""
    recipes = {
        "a tiny model's": ([*TINY, "trainer.max_epochs=6"], "≤ 0.15 ms a step"),
        "the chapter's": (["trainer.max_epochs=10"], "≤ 3 %"),
        "shakespeare_cpu's": (["experiment=shakespeare_cpu", f"data.path={config.path}", *SHORT], "≤ 3 %"),
    }
    rows: list[Row] = []
    for name, (overrides, wanted) in recipes.items():
        differences, percents = [], []
        for _ in range(config.rounds):
            with tempfile.TemporaryDirectory() as folder:
                run = train(*overrides, CPU, "compile=false", parent=folder)
                log_figures(f"{name}, scripts/train.py", run)
                loop = log_figures(f"{name}, plain loop", run_in_new_process(plain_loop, f"{folder}/run"))
            loop_seconds = loop["training_seconds"]
            differences.append(1000 * (run["training_seconds"] - loop_seconds) / loop["num_steps"])
            percents.append(100 * (run["training_seconds"] / loop_seconds - 1))
        what = f"Lightning's overhead, {name} recipe, {1000 * loop_seconds / loop['num_steps']:.1f} ms a step"
        reached = f"{median_text(differences)} ms, {median_text(percents)} %"
        rows.append((6, what, wanted, reached, f"{range_text(differences)} ms, {range_text(percents)} %"))
    return rows


def optimizer_share(config: DictConfig) -> list[Row]:
    """Goal 7: the share of a step's time that the optimizer takes."""
    overrides = ["experiment=shakespeare_cpu", CPU, f"data.path={config.path}", *SHORT, "compile=true"]
    percents = []
    for _ in range(config.rounds):
        with tempfile.TemporaryDirectory() as folder:
            train(*overrides, parent=folder)
            loop = log_figures("plain loop", run_in_new_process(plain_loop, f"{folder}/run"))
            percents.append(100 * loop["optimizer_seconds"] / loop["training_seconds"])
    what = "Muon's share of a step, `shakespeare_cpu`"
    return [(7, what, "≤ 20 %", f"{median_text(percents)} %", f"{range_text(percents)} %")]


def gpu_utilization(config: DictConfig) -> list[Row]:
    """Goals 8 and 7: GPT-2 on one GPU, on random tokens."""
    what, share = "`experiment=gpt2_124m` on one GPU", "Muon's share of a step, `gpt2_124m` on one GPU"
    if not torch.cuda.is_available():
        return [(8, what, "≥ 50 % of the peak", "n/a", "no GPU here"), (7, share, "≤ 3 %", "n/a", "no GPU here")]
    with tempfile.TemporaryDirectory() as folder:
        np.random.default_rng(0).integers(0, 50257, 20_000_000, np.uint16).tofile(f"{folder}/train.bin")
        data = f"data.train_path={folder}/train.bin", "data.val_path=null", "tokenizer=ids"
        short = "trainer.max_steps=60", "schedule.warmup_steps=10", "trainer.log_every_n_steps=5", "compile=true"
        log_figures(what, train("experiment=gpt2_124m", *data, *short, parent=folder))
        with Path(f"{folder}/run/metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/tokens_per_sec"]][2:]  # after compilation
        loop = log_figures(f"{what}, plain loop", run_in_new_process(plain_loop, f"{folder}/run"))
    speed = median_text([float(row["train/tokens_per_sec"]) for row in rows], ",.0f")
    percents = [100 * float(row["train/mfu"]) for row in rows if row.get("train/mfu")] or [math.nan]
    percent = 100 * loop["optimizer_seconds"] / loop["training_seconds"]
    return [
        (8, what, "≥ 50 % of the peak", f"{median_text(percents)} %, {speed} tokens/s", range_text(percents)),
        (7, share, "≤ 3 %", f"{percent:.3g} %", "1 round"),
    ]


def startup_time(config: DictConfig) -> list[Row]:
    """Goal 9: the time until a command answers."""
    commands = {
        "`scripts/train.py --help`": (["--help"], "≤ 1 s"),
        "first step of the default run, and its end": (["trainer.max_steps=1", "schedule.warmup_steps=1"], "≤ 6 s"),
    }
    rows: list[Row] = []
    for name, (arguments, wanted) in commands.items():
        seconds = []
        for _ in range(config.rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                seconds.append(time_train_script(f"folder={folder}/run", *arguments))
        seconds = seconds[1:]  # the first command reads the files from the disk
        rows.append((9, name, wanted, f"{median_text(seconds)} s", f"{range_text(seconds)} s"))
    return rows


def plain_loop(folder: str) -> dict[str, float]:
    """Repeat a run's training steps without Lightning; its epochs must be whole ones (no `limit_train_batches`).

    Returns their number, the seconds of all of them and of their optimizer steps, and the mean loss. The first 10 steps
    of a compiled run are not counted, because the network is compiled in them.
    """
    config: Any = OmegaConf.load(f"{folder}/config.yaml")
    torch.manual_seed(config.seed)
    device = torch.device(device_type(config.trainer.accelerator))
    data, network = build(config, "data"), build(config, "model").to(device)
    optimizer, schedule = build(config, "optimizer")(network.named_parameters()), build(config, "schedule")
    bfloat16 = torch.autocast(device.type, torch.bfloat16, config.trainer.precision == "bf16-mixed")
    peaks = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]
    cross_entropy, uncounted = F.cross_entropy, 0
    if config.compile:
        network.compile_for_training(options={"fallback_random": True})
        cross_entropy, uncounted = torch.compile(cross_entropy), 10
    accumulate = config.trainer.accumulate_grad_batches
    losses: list[torch.Tensor] = []
    step, epoch, optimizer_seconds = 0, -1, 0.0
    start = synchronized_time(device)
    while step < config.total_steps:
        epoch, loader = epoch + 1, data.train_dataloader()
        loader.batch_sampler.epoch = partial(int, epoch)  # without a trainer it would repeat the order of the first
        for i, batch in enumerate(loader):
            inputs, targets = (each.to(device, non_blocking=True) for each in batch)
            first = i - i % accumulate  # batch of this step; the last step of an epoch may have fewer than the others
            batches_in_step = min(accumulate, len(loader) - first)
            if step == uncounted and i == first:
                start, optimizer_seconds = synchronized_time(device), 0.0
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = schedule(step) * peak
            with bfloat16:
                loss = cross_entropy(network(inputs).flatten(0, 1), targets.flatten())
            (loss / batches_in_step).backward()
            losses.append(loss.detach())
            if i + 1 < first + batches_in_step:
                continue
            optimizer_seconds += time_optimizer_step(network, optimizer, config.trainer.gradient_clip_val, device)
            step += 1
            if step == config.total_steps:
                break
    seconds = synchronized_time(device) - start
    counted = {"num_steps": step - uncounted, "training_seconds": seconds, "optimizer_seconds": optimizer_seconds}
    return counted | {"loss": torch.stack(losses).double().mean().item()}


def time_optimizer_step(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, device: torch.device
) -> float:
    """Clip the gradients, update the weights and clear the gradients; return the seconds of the update alone."""
    clip_grad_norm_(network.parameters(), max_norm)
    start = synchronized_time(device)
    optimizer.step()
    seconds = synchronized_time(device) - start
    optimizer.zero_grad()
    return seconds


def synchronized_time(device: torch.device) -> float:
    """Return the time in seconds, when the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
