"""Measure the cost of large corpora: memory and time to prepare a text, and to load batches from a token file.

The text is random: words with Zipf-distributed frequencies. The token file is sparse, so it takes no disk space.
Windows are read from all of it, none twice. Memory is the process's anonymous memory (RssAnon, on Linux only), in
addition to what the imports need.
"""

import shutil
import statistics
import threading
import time
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from measure import run_in_new_process, save_figures
from omegaconf import DictConfig
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from language_model.data.bpe import BPETokenizer
from language_model.data.datamodule import TokenData
from language_model.data.prepare import MakeTokenizer, prepare
from language_model.data.text_files import TextFiles
from language_model.data.token_files import TokenFile
from language_model.data.tokenizer import ByteTokenizer, CharTokenizer, IdTokenizer
from language_model.files import ROOT
from language_model.runs.command_line import entry_point
from language_model.runs.config import check_values, errors_for_key
from language_model.training.hardware import best_precision, describe_device

KEYS = {
    "text_gb": NonNegativeFloat,
    "tokens_gb": NonNegativeFloat,
    "rounds": PositiveInt,
    "folder": str,
    "figures": str,
}
RECIPES = {"nano": (12, 64), "baby": (64, 256)}  # nanoGPT's: windows in a batch, tokens in a window


@entry_point("benchmark_data")
def main(config: DictConfig) -> None:
    """Prepare a text with each tokenizer, then load from a small and a large token file in turns."""
    check_values(config, KEYS)
    folder = Path(config.folder)
    with errors_for_key("folder"):
        folder.mkdir(parents=True)
    figures: dict[str, Any] = {"machine": describe_device(torch.device("cpu"))}
    print(figures["machine"])
    try:
        if config.text_gb:
            figures["prepare"] = measure_preparation(folder, config.text_gb)
        if config.tokens_gb:
            figures["load"] = measure_loading(folder, config.tokens_gb, config.rounds)
    finally:
        shutil.rmtree(folder)
    save_figures(Path(config.figures), figures)
    print(f"\nfigures in {config.figures}")


def measure_preparation(folder: Path, gigabytes: float) -> dict[str, dict[str, float]]:
    """Return the peak memory (MB) and the speed (MB of text per second) of preparing a text, for each tokenizer."""
    text = folder / "text.txt"
    write_text(text, int(gigabytes * 1e9))
    print(f"\nprepare {gigabytes:g} GB of text        peak memory   text per second   tokens")
    figures = {}
    for name in ("char", "byte", "bpe"):
        figures[name] = measured = run_in_new_process(prepare_text, text, name)
        memory, speed = f"{measured['mb']:7.0f} MB", f"{measured['mb_per_s']:12.1f} MB"
        print(f"  tokenizer={name:18} {memory} {speed} {measured['tokens']:14,}")
    text.unlink()
    return figures


def write_text(path: Path, num_bytes: int) -> None:
    """Write a text of random words, whose frequencies follow Zipf's law."""
    generator = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    lengths = generator.integers(2, 10, 200_000)
    words = np.array(["".join(generator.choice(letters, length)) for length in lengths])
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            chosen = words[np.minimum(generator.zipf(1.2, 200_000), len(words)) - 1]
            file.write(" ".join(chosen)[: num_bytes - file.tell() - 1] + "\n")


def prepare_text(text: Path, name: str) -> dict[str, float]:
    """Prepare a text with a tokenizer; return the peak memory, the speed and the number of training tokens."""
    makers: dict[str, MakeTokenizer] = {
        "char": CharTokenizer.from_texts,
        "byte": ByteTokenizer.from_texts,
        "bpe": partial(BPETokenizer.train, vocab_size=4096),
    }
    cache = text.parent / name
    with PeakMemory() as peak:
        start = time.perf_counter()
        corpus = prepare(TextFiles(str(text)), None, 0.1, makers[name], False, cache, lambda *_: None)
        seconds = time.perf_counter() - start
    shutil.rmtree(cache)
    return {"mb": peak.mb, "mb_per_s": text.stat().st_size / 1e6 / seconds, "tokens": corpus.facts["train"]["tokens"]}


class PeakMemory:
    """Context manager: `mb` is the highest increase of this process's anonymous memory within it (MB)."""

    def __enter__(self) -> "PeakMemory":
        self.before, self.mb = anonymous_mb(), 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.mb = max(self.mb, anonymous_mb() - self.before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def anonymous_mb() -> float:
    """Return the anonymous memory of this process (MB)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def measure_loading(folder: Path, gigabytes: float, rounds: int) -> dict[str, dict[str, float]]:
    """Return the time of loading a batch from a token file of 1 MB and from a large one, and of a training step."""
    for name, num_bytes in (("small", 1e6), ("large", gigabytes * 1e9)):
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(int(num_bytes))
    print(f"\nload a batch                 from 1 MB   from {gigabytes:g} GB   training step   memory")
    figures = {}
    for recipe, (batch_size, seq_len) in RECIPES.items():
        figures[recipe] = measured = run_in_new_process(time_recipe, folder, batch_size, seq_len, rounds, recipe)
        small, large, step = measured["small_us"], measured["large_us"], measured["step_us"]
        print(
            f"  {recipe} ({batch_size} windows of {seq_len:3}) {small:10.0f} µs {large:9.0f} µs {step / 1e3:13.1f} ms "
            f"{measured['mb']:8.1f} MB\n       of a step: {small / step:.2%} and {large / step:.2%}; so training is "
            f"{(large - small) / (small + step):.2%} slower from {gigabytes:g} GB than from 1 MB"
        )
    return figures


def time_recipe(folder: Path, batch_size: int, seq_len: int, rounds: int, recipe: str) -> dict[str, float]:
    """Return the time of a batch from each file and of a training step (µs, medians), and the loaders' peak memory."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [f"model={recipe}", "vocab_size=65"])
    with PeakMemory() as peak:
        loaders = {}
        for name in ("small", "large"):
            tokens = [TokenFile(folder / f"{name}.bin", "uint16")]
            data = TokenData(name, IdTokenizer(65), tokens, [], seq_len, batch_size, seq_len, num_workers=0, seed=0)
            loaders[name] = chain.from_iterable(repeat(data.train_dataloader()))
        times: dict[str, list[float]] = {name: [] for name in loaders}
        for i in range(100 * (rounds + 1)):  # the first 100 batches are a warm-up
            for name, loader in loaders.items():
                start = time.perf_counter()
                next(loader)
                if i >= 100:
                    times[name].append(time.perf_counter() - start)
    inputs, targets = next(loaders["small"])
    steps = time_steps(instantiate(config.model), inputs, targets, 4 + rounds)[4:]  # the first 4 are a warm-up
    microseconds = {f"{name}_us": 1e6 * statistics.median(some) for name, some in times.items()}
    return microseconds | {"step_us": 1e6 * statistics.median(steps), "mb": peak.mb}


def time_steps(network: nn.Module, inputs: Tensor, targets: Tensor, num_steps: int) -> list[float]:
    """Return the seconds of each of some training steps on the same batch."""
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        with torch.autocast("cpu", enabled=best_precision("cpu") == "bf16-mixed"):
            loss = F.cross_entropy(network(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
