"""Measure what large corpora cost: memory and time to prepare a text, and to load batches from a token file.

The text is made up: words of Zipf's frequencies. The token file is sparse, so that its size costs no space; windows
from everywhere in it are read, none twice. Memory is what a process has to itself (RssAnon, so Linux only), above what
it has after its imports.
"""

import json
import multiprocessing
import shutil
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from language_model.data.bpe import BPETokenizer
from language_model.data.datamodule import TokenData
from language_model.data.prepare import MakeTokenizer, prepare
from language_model.data.text_files import TextFiles
from language_model.data.token_files import TokenFile
from language_model.data.tokenizer import ByteTokenizer, CharTokenizer, IdTokenizer
from language_model.files import ROOT
from language_model.runs.config import entry_point
from language_model.training.hardware import best_precision, describe_device

RECIPES = {"nano": (12, 64), "baby": (64, 256)}  # of nanoGPT: windows in a batch, tokens in a window


@entry_point("benchmark_data")
def main(config: DictConfig) -> None:
    """Prepare a text with each tokenizer, then load from a small and a large token file in turns."""
    folder = Path(config.folder)
    folder.mkdir(parents=True)
    figures: dict[str, Any] = {"machine": describe_device(torch.device("cpu"))}
    print(figures["machine"])
    try:
        if config.text_gb:
            figures["prepare"] = preparing(folder, config.text_gb)
        if config.tokens_gb:
            figures["load"] = loading(folder, config.tokens_gb, config.rounds)
    finally:
        shutil.rmtree(folder)
    Path(config.figures).write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nfigures in {config.figures}")


def in_new_process(function: Any, *arguments: Any) -> Any:
    """Return what a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def preparing(folder: Path, gigabytes: float) -> dict[str, dict[str, float]]:
    """Return peak memory (MB) and speed (MB of text a second) of preparing a text, for each tokenizer."""
    text = folder / "text.txt"
    write_text(text, int(gigabytes * 1e9))
    print(f"\nprepare {gigabytes:g} GB of text        peak memory   text a second   tokens")
    figures = {}
    for name in ("char", "byte", "bpe"):
        figures[name] = in_new_process(prepare_one, text, name)
        found = figures[name]
        print(f"  tokenizer={name:18} {found['mb']:7.0f} MB {found['mb_per_s']:10.1f} MB {found['tokens']:14,}")
    text.unlink()
    return figures


def write_text(path: Path, num_bytes: int) -> None:
    """Write so much text of made-up words, as frequent as Zipf has them."""
    generator = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    lengths = generator.integers(2, 10, 200_000)
    words = np.array(["".join(generator.choice(letters, length)) for length in lengths])
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            chosen = words[np.minimum(generator.zipf(1.2, 200_000), len(words)) - 1]
            file.write(" ".join(chosen)[: num_bytes - file.tell() - 1] + "\n")


def prepare_one(text: Path, name: str) -> dict[str, float]:
    """Prepare a text with a tokenizer; return memory and speed."""
    makers: dict[str, MakeTokenizer] = {
        "char": CharTokenizer.from_texts,
        "byte": ByteTokenizer.from_texts,
        "bpe": partial(BPETokenizer.train, vocab_size=4096),
    }
    cache = text.parent / name
    with Peak() as peak:
        started = time.perf_counter()
        corpus = prepare(TextFiles(str(text)), None, 0.1, makers[name], False, cache, lambda *_: None)
        seconds = time.perf_counter() - started
    shutil.rmtree(cache)
    return {"mb": peak.mb, "mb_per_s": text.stat().st_size / 1e6 / seconds, "tokens": corpus.facts["train"]["tokens"]}


class Peak:
    """The most anonymous memory that this process has while inside, above what it had at the start (MB)."""

    def __enter__(self) -> "Peak":
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
    """Return the memory that this process has to itself."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def loading(folder: Path, gigabytes: float, rounds: int) -> dict[str, dict[str, float]]:
    """Return the time of a batch from a token file of 1 MB and from a large one, and of a training step."""
    for name, num_bytes in (("small", 1e6), ("large", gigabytes * 1e9)):
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(int(num_bytes))
    print(f"\nload a batch                 from 1 MB   from {gigabytes:g} GB   training step   memory")
    figures = {}
    for recipe, (batch_size, seq_len) in RECIPES.items():
        found = in_new_process(load_both, folder, batch_size, seq_len, rounds, recipe)
        figures[recipe] = found
        small, large, step = found["small_us"], found["large_us"], found["step_us"]
        print(
            f"  {recipe} ({batch_size} windows of {seq_len:3}) {small:10.0f} µs {large:9.0f} µs {step / 1e3:13.1f} ms "
            f"{found['mb']:8.1f} MB\n       of a step: {small / step:.2%} and {large / step:.2%}; so training is "
            f"{(large - small) / (small + step):.2%} slower from {gigabytes:g} GB than from 1 MB"
        )
    return figures


def load_both(folder: Path, batch_size: int, seq_len: int, rounds: int, recipe: str) -> dict[str, float]:
    """Return the time of a batch from either file and of a training step (µs, medians), and the loaders' memory."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [f"model={recipe}", "vocab_size=65"])
    with Peak() as peak:
        loaders = {}
        for name in ("small", "large"):
            tokens = [TokenFile(folder / f"{name}.bin", "uint16")]
            data = TokenData(name, IdTokenizer(65), tokens, [], seq_len, batch_size, seq_len, num_workers=0, seed=0)
            loaders[name] = chain.from_iterable(repeat(data.train_dataloader()))
        times: dict[str, list[float]] = {name: [] for name in loaders}
        for i in range(100 * (rounds + 1)):  # the first round warms up
            for name, loader in loaders.items():
                started = time.perf_counter()
                next(loader)
                if i >= 100:
                    times[name].append(time.perf_counter() - started)
    network = instantiate(config.model)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    inputs, targets = next(loaders["small"])
    steps = []
    for _ in range(4 + rounds):
        started = time.perf_counter()
        with torch.autocast("cpu", enabled=best_precision("cpu") == "bf16-mixed"):
            loss = F.cross_entropy(network(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - started)
    microseconds = {f"{name}_us": 1e6 * statistics.median(some) for name, some in times.items()}
    return microseconds | {"step_us": 1e6 * statistics.median(steps[4:]), "mb": peak.mb}


if __name__ == "__main__":
    main()
