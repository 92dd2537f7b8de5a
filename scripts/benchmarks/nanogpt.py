"""nanoGPT's recipe for a CPU, from its README: nanoGPT itself, or a plain loop that computes the same."""

import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import last_error_line, run_in_new_process
from torch.nn.utils import clip_grad_norm_

from language_model.model.gpt import GPT
from language_model.runs.config import ConfigError
from language_model.training.optimizer import adamw
from language_model.training.schedule import warmup_cosine

V, C, T, B, STEPS = 65, 128, 64, 12, 2000
ARGUMENTS = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
ARGUMENTS += " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
FINAL_LOSS = 1.898  # over the whole validation split


def run_nanogpt(text: str, checkout: str | None) -> dict[str, float]:
    """Run the recipe on a text file, by nanoGPT's own code if there is a checkout of it, else by `nanogpt_loop`."""
    start = time.perf_counter()
    figures = run_checkout(text, checkout) if checkout else run_in_new_process(nanogpt_loop, text)
    return figures | {"command_seconds": time.perf_counter() - start}


def run_checkout(text: str, checkout: str) -> dict[str, float]:
    """Run a copy of a checkout; the loss is nanoGPT's own estimate, from 20 batches.

    The time that it prints for some steps includes an evaluation. These are the ones at least five times as long as the
    median; they count as the median.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(checkout, f"{folder}/nanogpt", ignore=shutil.ignore_patterns(".git", "*.pt")))
        data = copy / "data" / "shakespeare_char"
        for split, tokens in zip(("train", "val"), split_tokens(text), strict=True):
            tokens.astype(np.uint16).tofile(data / f"{split}.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": V}))
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *ARGUMENTS.split()]
        done = subprocess.run([*command, f"--out_dir={folder}"], cwd=copy, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"nanogpt={checkout}: {last_error_line(done)}")
    steps = [float(ms) / 1000 for ms in re.findall(r"^iter \d+: loss [\d.]+, time ([\d.]+)ms", done.stdout, re.M)]
    losses = re.findall(r"^step \d+: train loss [\d.]+, val loss ([\d.]+)", done.stdout, re.M)
    median = statistics.median(steps)
    return {"training_seconds": sum(s if s < 5 * median else median for s in steps), "loss": float(losses[-1])}


def nanogpt_loop(text: str) -> dict[str, float]:
    """Train in a plain loop as nanoGPT does: float32, not compiled, AdamW, a loss estimate every 250 steps."""
    train, val = (torch.from_numpy(tokens.astype(np.int64)) for tokens in split_tokens(text))
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
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, 1e-3, STEPS + 1, 100, 1e-4)
        loss(*batch(train)).backward()
        clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - start
    network.eval()
    windows = val[: (len(val) - 1) // T * T + 1]
    with torch.no_grad():
        split_loss = loss(windows[:-1].view(-1, T), windows[1:].view(-1, T)).item()
    return {"training_seconds": seconds, "loss": split_loss}


def split_tokens(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a text file's training and validation split, numbered and split as nanoGPT does."""
    characters = Path(text).read_text(encoding="utf-8")
    ids = {character: i for i, character in enumerate(sorted(set(characters)))}
    tokens = np.array([ids[character] for character in characters])
    return tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]
