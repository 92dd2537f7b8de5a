"""Measure this project against its goals, each beside its reference in the same run, in turns on the same machine.

Time to a loss, the loss in a time, what Lightning and the optimizer cost, how soon a command answers. The recipes are
those of ``conf/experiment``; runs are ``scripts/train.py`` as a user starts it, in a process of its own, logging and
checkpoints on. A goal that this machine cannot measure says so.
"""

import csv
import json
import math
import multiprocessing
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveInt
from torch.nn.utils import clip_grad_norm_

from language_model.data.text_files import download
from language_model.files import ROOT
from language_model.model.gpt import GPT
from language_model.runs.config import ConfigError, build, check_values, entry_point
from language_model.training.hardware import describe_device, device_type
from language_model.training.module import Mean
from language_model.training.optimizer import adamw
from language_model.training.schedule import warmup_cosine

TINY_SHAKESPEARE = OmegaConf.load(ROOT / "conf" / "data" / "tinyshakespeare.yaml")
# NanoGPT's recipe for a CPU, as its README gives it.
V, C, T, B, STEPS = 65, 128, 64, 12, 2000
NANOGPT = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
NANOGPT += " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
TARGET = 1.898  # what it comes to, over the whole split


@entry_point("benchmark_goals")
def main(config: DictConfig) -> None:
    """Measure the goals that are asked for; print a table, and keep the figures."""
    goals: dict[int, Callable[[DictConfig], list[Row]]] = {
        1: time_to_loss, 2: time_to_loss, 3: partial(recipe, 3), 4: partial(recipe, 4), 5: partial(recipe, 5),
        6: lightnings_cost, 7: optimizers_share, 8: gpu, 9: start,
    }  # fmt: skip
    check_values(config, {"goals": list[int], "rounds": PositiveInt, "path": str | None, "nanogpt": str | None})
    unknown = [goal for goal in config.goals if goal not in goals]
    if unknown or not config.goals:
        raise ConfigError(f"goals={list(config.goals)}: there are 1 to 9")
    if config.path is None and min(config.goals) < 8:
        config.path = str(download(TINY_SHAKESPEARE.url, TINY_SHAKESPEARE.sha256, ROOT / "outputs" / "corpora"))
    for key, path in (("path", config.path), ("nanogpt", config.nanogpt and f"{config.nanogpt}/train.py")):
        if path and not Path(path).is_file():
            raise ConfigError(f"{key}: {path} does not exist")
    config.path = config.path and str(Path(config.path).resolve())
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    machine = f"{date.today()}, {describe_device(device)}, {config.rounds} rounds"
    target = ROOT / "outputs" / "benchmarks" / "goals.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for measure in dict.fromkeys(goals[goal] for goal in config.goals):
        rows += [row for row in measure(config) if row[0] in config.goals]
        figures = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        target.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")
        table = f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|\n"
        table += "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
        if config.table:
            Path(config.table).write_text(f"{machine}:\n\n{table}", encoding="utf-8")
    print(f"\n{machine}\n\n{table}\nfigures in {target}")


Row = tuple[int, str, str, str, str]
COLUMNS = ("goal", "what", "wanted", "reached", "spread")
CPU = "trainer.accelerator=cpu"


def time_to_loss(config: DictConfig) -> list[Row]:
    """Goals 1 and 2: the time to nanoGPT's loss at its context, of the steps and of the whole command."""
    theirs, ours = [], []
    for i in range(config.rounds):
        theirs.append(say("nanoGPT", nanogpt(config)))
        ours.append(
            say("this project", train("experiment=shakespeare_cpu_64", CPU, f"data.path={config.path}", f"seed={i}"))
        )
    losses = [run["loss"] for run in ours]
    late = "" if statistics.mean(losses) <= TARGET else ", not reached"
    said = f"{statistics.mean(losses):.3f}{late} against {statistics.mean(run['loss'] for run in theirs):.3f}"
    rows: list[Row] = []
    for goal, key, wanted in ((1, "steps", 0.1), (2, "whole", 0.2)):
        ratios = [o[key] / t[key] for o, t in zip(ours, theirs, strict=True)]
        what = f"time to {TARGET} at context 64, {'steps only' if goal == 1 else 'the whole command'}, over nanoGPT's"
        seconds = (
            f"{statistics.median(o[key] for o in ours):.1f} s over {statistics.median(t[key] for t in theirs):.1f} s"
        )
        rows.append((goal, what, f"≤ {wanted}", middle(ratios), f"{ends(ratios)}; {seconds}; val/loss {said}"))
    return rows


def recipe(goal: int, config: DictConfig) -> list[Row]:
    """Goals 3 to 5: what a recipe comes to, over several seeds, and in how long."""
    name, wanted = {
        3: ("shakespeare_cpu", "loss ≤ 1.50 in nanoGPT's time for the whole command"),
        4: ("shakespeare_cpu_long", "loss ≤ 1.4697 in ≤ 300 s"),
        5: ("shakespeare_cpu_hour", "loss ≤ 1.42 in ≤ 3,600 s"),
    }[goal]
    runs, reference = [], []
    for i in range(config.rounds):
        if goal == 3:
            reference.append(say("nanoGPT", nanogpt(config)))
        runs.append(say(name, train(f"experiment={name}", CPU, f"data.path={config.path}", f"seed={i}")))
    losses, whole = [run["loss"] for run in runs], [run["whole"] for run in runs]
    spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
    words = f"± {spread:.4f}; whole command {ends(whole)} s, steps {middle([run['steps'] for run in runs])} s"
    if reference:
        words += f"; nanoGPT {middle([run['whole'] for run in reference])} s"
    return [(goal, f"`experiment={name}`", wanted, f"{statistics.mean(losses):.4f}", words)]


def lightnings_cost(config: DictConfig) -> list[Row]:
    """Goal 6: a run's steps against a bare loop over the same batches, network, optimizer and schedule."""
    recipes = {
        "a tiny model's": ([*TINY, "trainer.max_epochs=6"], "≤ 0.15 ms a step"),
        "the chapter's": (["trainer.max_epochs=10"], "≤ 3 %"),
        "shakespeare_cpu's": (["experiment=shakespeare_cpu", f"data.path={config.path}", *SHORT], "≤ 3 %"),
    }
    rows: list[Row] = []
    for name, (overrides, wanted) in recipes.items():
        differences, shares = [], []
        for _ in range(config.rounds):
            with tempfile.TemporaryDirectory() as folder:
                run = say(f"{name}, scripts/train.py", train(*overrides, CPU, "compile=false", folder=folder))
                bare = say(f"{name}, bare loop", in_new_process(bare_loop, f"{folder}/run"))
            differences.append(1000 * (run["steps"] - bare["steps"]) / bare["number"])
            shares.append(100 * (run["steps"] / bare["steps"] - 1))
        what = f"Lightning's cost, {name} recipe, {1000 * bare['steps'] / bare['number']:.1f} ms a step"
        reached, spread = f"{middle(differences)} ms, {middle(shares)} %", f"{ends(differences)} ms, {ends(shares)} %"
        rows.append((6, what, wanted, reached, spread))
    return rows


def optimizers_share(config: DictConfig) -> list[Row]:
    """Goal 7: the share of a step that the optimizer takes."""
    shares = []
    for _ in range(config.rounds):
        with tempfile.TemporaryDirectory() as folder:
            train("experiment=shakespeare_cpu", CPU, f"data.path={config.path}", *SHORT, "compile=true", folder=folder)
            bare = say("bare loop", in_new_process(bare_loop, f"{folder}/run"))
            shares.append(100 * bare["optimizer"] / bare["steps"])
    return [(7, "Muon's share of a step, `shakespeare_cpu`", "≤ 20 %", f"{middle(shares)} %", f"{ends(shares)} %")]


def gpu(config: DictConfig) -> list[Row]:
    """Goals 8 and 7: GPT-2 on one GPU, on made-up tokens."""
    what, share = "`experiment=gpt2_124m` on one GPU", "Muon's share of a step, `gpt2_124m` on one GPU"
    if not torch.cuda.is_available():
        return [(8, what, "≥ 50 % of the peak", "n/a", "no GPU here"), (7, share, "≤ 3 %", "n/a", "no GPU here")]
    with tempfile.TemporaryDirectory() as folder:
        np.random.default_rng(0).integers(0, 50257, 20_000_000, np.uint16).tofile(f"{folder}/train.bin")
        data = f"data.train_path={folder}/train.bin", "data.val_path=null", "tokenizer=ids"
        short = "trainer.max_steps=60", "schedule.warmup_steps=10", "trainer.log_every_n_steps=5", "compile=true"
        run = train("experiment=gpt2_124m", *data, *short, folder=folder)
        with Path(f"{folder}/run/metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/tokens_per_sec"]][2:]  # behind the compiling
        bare = say(f"{what}, bare loop", in_new_process(bare_loop, f"{folder}/run"))
    speed = [float(row["train/tokens_per_sec"]) for row in rows]
    shares = [100 * float(row["train/mfu"]) for row in rows if row.get("train/mfu")] or [math.nan]
    say(what, run)
    return [
        (8, what, "≥ 50 % of the peak", f"{middle(shares)} %, {statistics.median(speed):,.0f} tokens/s", ends(shares)),
        (7, share, "≤ 3 %", f"{100 * bare['optimizer'] / bare['steps']:.3g} %", "1 round"),
    ]


def start(config: DictConfig) -> list[Row]:
    """Goal 9: how soon a command answers."""
    commands = {
        "`scripts/train.py --help`": (["--help"], "≤ 1 s"),
        "first step of the default run, and its end": (["trainer.max_steps=1", "schedule.warmup_steps=1"], "≤ 6 s"),
    }
    rows: list[Row] = []
    for name, (arguments, wanted) in commands.items():
        seconds = []
        for _ in range(config.rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"folder={folder}/run", *arguments]
                began = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - began)
        seconds = seconds[1:]  # the first one reads the files from the disk
        rows.append((9, name, wanted, f"{middle(seconds)} s", f"{ends(seconds)} s"))
    return rows


TINY = ["model.d_model=8", "model.n_heads=1", "model.n_layers=1", "model.d_ff=16", "model.max_seq_len=8"]
TINY += ["data.batch_size=4"]
SHORT = ["trainer.max_steps=100", "trainer.val_check_interval=100"]


def train(*overrides: str, folder: str | None = None) -> dict[str, float]:
    """Return the seconds of a run, whole and of its steps, and its val/loss."""
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"folder={place}/run", *overrides]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        whole = time.perf_counter() - began
        if done.returncode:
            raise ConfigError(f"{' '.join(command)}: {last_words(done)}")
        result = json.loads((Path(place) / "run" / "result.json").read_text())
    loss = result["metrics"].get("val/loss", math.nan)
    return {"whole": whole, "steps": result["tokens"] / result["tokens_per_sec"], "loss": loss}


def bare_loop(folder: str) -> dict[str, float]:
    """Do a run's steps again without Lightning; return their number, seconds, the optimizer's part, the mean loss.

    Of a compiled run the first 10 steps, in which that is done, are not counted.
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
    clip, accumulate = config.trainer.gradient_clip_val, config.trainer.accumulate_grad_batches
    step, optimizing, losses = 0, 0.0, Mean()

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    while step < config.total_steps:
        loader = data.train_dataloader()
        for i, batch in enumerate(loader, 1):
            inputs, targets = (each.to(device, non_blocking=True) for each in batch)
            if step == uncounted and (i - 1) % accumulate == 0:
                began, optimizing = now(), 0.0
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = schedule(step) * peak
            with bfloat16:
                loss = cross_entropy(network(inputs).flatten(0, 1), targets.flatten())
            (loss / accumulate).backward()
            losses.add(loss.detach())
            if i % accumulate and i < len(loader):
                continue
            clip_grad_norm_(network.parameters(), clip)
            stepping = now()
            optimizer.step()
            optimizing += now() - stepping
            optimizer.zero_grad()
            step += 1
            if step == config.total_steps:
                break
    seconds = now() - began
    return {"number": step - uncounted, "steps": seconds, "optimizer": optimizing, "loss": float(losses.value)}


def nanogpt(config: DictConfig) -> dict[str, float]:
    """Run nanoGPT's recipe: itself, or a bare loop that does the same."""
    began = time.perf_counter()
    found = nanogpt_itself(config) if config.nanogpt else in_new_process(nanogpts_loop, config.path)
    return found | {"whole": time.perf_counter() - began}


def nanogpt_itself(config: DictConfig) -> dict[str, float]:
    """Run a copy of the checkout; its loss is its own estimate, from 20 batches.

    A step that it prints as five times as long as usual has an evaluation in it, and counts as a usual one.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(config.nanogpt, f"{folder}/nanogpt", ignore=shutil.ignore_patterns(".git", "*.pt")))
        for name, tokens in zip(("train", "val"), shakespeare(config.path), strict=True):
            tokens.astype(np.uint16).tofile(copy / "data" / "shakespeare_char" / f"{name}.bin")
        (copy / "data" / "shakespeare_char" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": V}))
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT.split()]
        done = subprocess.run([*command, f"--out_dir={folder}"], cwd=copy, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"nanogpt={config.nanogpt}: {last_words(done)}")
    steps = [float(ms) / 1000 for ms in re.findall(r"^iter \d+: loss [\d.]+, time ([\d.]+)ms", done.stdout, re.M)]
    losses = re.findall(r"^step \d+: train loss [\d.]+, val loss ([\d.]+)", done.stdout, re.M)
    usual = statistics.median(steps)
    return {"steps": sum(s if s < 5 * usual else usual for s in steps), "loss": float(losses[-1])}


def nanogpts_loop(path: str) -> dict[str, float]:
    """Do nanoGPT's recipe in a bare loop: float32, eager, AdamW, a loss estimate every 250 steps, as it does."""
    train, val = (torch.from_numpy(tokens.astype(np.int64)) for tokens in shakespeare(path))
    torch.manual_seed(1337)
    network = GPT(V, C, 4, 4, 4 * C, T, bias=False)
    optimizer = adamw(network.named_parameters(), 1e-3, (0.9, 0.99), 1e-8, 0.1, decay_matrices_only=True, fused=False)

    def batch(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(tokens) - T, (B,)).tolist()
        return tuple(torch.stack([tokens[i + shift : i + shift + T] for i in starts]) for shift in (0, 1))  # type: ignore

    def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(network(inputs).flatten(0, 1), targets.flatten())

    seconds = 0.0
    for step in range(STEPS + 1):
        if step % 250 == 0:
            network.eval()
            with torch.no_grad():
                for split in (train, val):
                    _ = [loss(*batch(split)).item() for _ in range(20)]
            network.train()
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, 1e-3, STEPS + 1, 100, 1e-4)
        loss(*batch(train)).backward()
        clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - began
    network.eval()
    windows = val[: (len(val) - 1) // T * T + 1]
    with torch.no_grad():
        over_split = loss(windows[:-1].view(-1, T), windows[1:].view(-1, T)).item()
    return {"steps": seconds, "loss": over_split}


def shakespeare(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of both splits, as nanoGPT numbers and divides them."""
    text = Path(path).read_text(encoding="utf-8")
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = np.array([ids[character] for character in text])
    return tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that a command had to say about its failure."""
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def in_new_process(function: Callable[[str], dict[str, float]], argument: str) -> dict[str, float]:
    """Return what a function returns in a process of its own, as each run has one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, argument).result()


def say(name: str, figures: dict[str, float]) -> dict[str, float]:
    """Tell what was measured just now."""
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    return figures


def middle(numbers: list[float]) -> str:
    """Return the median in words."""
    return f"{statistics.median(numbers):.3g}"


def ends(numbers: list[float]) -> str:
    """Return the range in words."""
    return f"{min(numbers):.3g} to {max(numbers):.3g}"


if __name__ == "__main__":
    main()
