"""nanoGPT's recipe for a CPU, from its README, on any text: nanoGPT itself, or a plain loop that computes the same."""

import importlib
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import last_error_line, run_in_new_process
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from language_model.model.gpt import GPT
from language_model.runs.config import ConfigError
from language_model.training.optimizer import adamw
from language_model.training.schedule import warmup_cosine

C, T, B, STEPS = 128, 64, 12, 2000
ARGUMENTS = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
ARGUMENTS += " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
ARGUMENTS += " --always_save_checkpoint=True"  # else the best by its estimate, which may be of an earlier step


def run_nanogpt(path: str, checkout: str | None) -> dict[str, float]:
    """Run the recipe on a text, by nanoGPT's own code if there is a checkout of it, else by `nanogpt_loop`.

    Returns the seconds of the training steps and of the whole command, and the loss over the whole validation split
    after 2,000 steps. Computing this loss is not counted, because nanoGPT does not do it.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if checkout:
            training_seconds = run_checkout(path, checkout, folder)
        else:
            training_seconds = run_in_new_process(nanogpt_loop, path, folder)
        command_seconds = time.perf_counter() - start
        loss = run_in_new_process(checkout_loss if checkout else loop_loss, path, folder)
    return {"training_seconds": training_seconds, "command_seconds": command_seconds, "loss": loss}


def run_checkout(path: str, checkout: str, folder: str) -> float:
    """Run a copy of a checkout, which saves its weights to `folder`; return the seconds of its training steps.

    The time that it prints for some steps includes an evaluation. These are the ones at least five times as long as the
    median; they count as the median.
    """
    copy = Path(shutil.copytree(checkout, f"{folder}/nanogpt", ignore=shutil.ignore_patterns(".git", "*.pt")))
    data = copy / "data" / "shakespeare_char"
    *splits, vocab_size = split_tokens(path)
    for name, tokens in zip(("train", "val"), splits, strict=True):
        tokens.astype(np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *ARGUMENTS.split()]
    done = subprocess.run([*command, f"--out_dir={folder}"], cwd=copy, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"nanogpt={checkout}: {last_error_line(done)}")
    steps = [float(ms) / 1000 for ms in re.findall(r"^iter \d+: loss [\d.]+, time ([\d.]+)ms", done.stdout, re.M)]
    median = statistics.median(steps)
    return sum(s if s < 5 * median else median for s in steps)


def checkout_loss(path: str, folder: str) -> float:
    """Return the loss over the whole validation split of the weights that `run_checkout` has saved."""
    sys.path.insert(0, f"{folder}/nanogpt")
    model: Any = importlib.import_module("model")
    saved = torch.load(f"{folder}/ckpt.pt", map_location="cpu", weights_only=True)
    network = model.GPT(model.GPTConfig(**saved["model_args"]))
    network.load_state_dict(saved["model"])
    network.eval()
    return mean_loss(lambda inputs, targets: network(inputs, targets)[1], split_tokens(path)[1])


def nanogpt_loop(path: str, folder: str) -> float:
    """Train in a plain loop as nanoGPT does: float32, not compiled, AdamW, a loss estimate every 250 steps.

    Saves the weights to `folder` after each estimate; returns the seconds of the training steps.
    """
    *splits, vocab_size = split_tokens(path)
    train, val = (torch.from_numpy(tokens.astype(np.int64)) for tokens in splits)
    torch.manual_seed(1337)
    network = make_network(vocab_size)
    optimizer = adamw(network.named_parameters(), 1e-3, (0.9, 0.99), 1e-8, 0.1, decay_matrices_only=True, fused=False)

    def batch(tokens: Tensor) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - T, (B,)).tolist()
        return tuple(torch.stack([tokens[i + shift : i + shift + T] for i in starts]) for shift in (0, 1))  # type: ignore

    seconds = 0.0
    for step in range(STEPS + 1):
        if step % 250 == 0:
            network.eval()
            with torch.no_grad():
                for split in (train, val):
                    _ = [cross_entropy(network, *batch(split)).item() for _ in range(20)]
            network.train()
            torch.save(network.state_dict(), f"{folder}/ckpt.pt")
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, 1e-3, STEPS + 1, 100, 1e-4)
        cross_entropy(network, *batch(train)).backward()
        clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - start
    return seconds


def loop_loss(path: str, folder: str) -> float:
    """Return the loss over the whole validation split of the weights that `nanogpt_loop` has saved."""
    _, val, vocab_size = split_tokens(path)
    network = make_network(vocab_size).eval()
    network.load_state_dict(torch.load(f"{folder}/ckpt.pt", weights_only=True))
    return mean_loss(lambda inputs, targets: cross_entropy(network, inputs, targets), val)


def make_network(vocab_size: int) -> GPT:
    """Return the recipe's network."""
    return GPT(vocab_size, C, 4, 4, 4 * C, T, bias=False)


def cross_entropy(network: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a batch (B, T), in nats a token."""
    return F.cross_entropy(network(inputs).flatten(0, 1), targets.flatten())


def mean_loss(loss: Callable[[Tensor, Tensor], Tensor], split: np.ndarray) -> float:
    """Return the mean loss over a whole split, in windows of T tokens one after the other; the last may be shorter."""
    tokens, total = torch.from_numpy(split.astype(np.int64)), 0.0
    with torch.no_grad():
        for inputs, targets in zip(tokens[:-1].split(T), tokens[1:].split(T), strict=True):
            total += len(targets) * loss(inputs[None], targets[None]).item()
    return total / (len(tokens) - 1)


def split_tokens(path: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return a text's training tokens, its validation tokens, and the number of different characters.

    Characters are numbered in sorted order, and the last tenth of the text is for validation, as nanoGPT does. Raises
    ValueError if the file is no UTF-8 text, or too short for the recipe.
    """
    text = Path(path).read_bytes().decode("utf-8")
    if len(text) <= 10 * T:
        raise ValueError(f"{path} has {len(text):,} characters; nanoGPT's recipe needs more than {10 * T}")
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = np.array([ids[character] for character in text])
    return tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :], len(ids)
