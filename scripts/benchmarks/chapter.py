"""Compare the speed of a run with the chapter's plain loop, in turns on the same machine.

The plain loop is the chapter's section 8 as printed: float32, a Dataset that serves one window at a time, AdamW with
PyTorch's defaults, and a network of PyTorch's own parts. The runs are `scripts/train.py` as a user starts it, with
logging and checkpoints, once in bfloat16 where the hardware has units for it and once in float32. Only the training
steps are compared, without imports and without the sample at the end.
"""

import time
from functools import partial

import torch
import torch.nn.functional as F
from measure import BENCHMARKS, median_text, range_text, run_in_new_process, save_figures, train
from omegaconf import DictConfig
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from language_model.files import ROOT
from language_model.runs.command_line import entry_point
from language_model.runs.config import check_values
from language_model.training.hardware import describe_device, has_bf16_units
from language_model.training.schedule import warmup_cosine

KEYS = {"rounds": PositiveInt, "epochs": PositiveInt}
V, C, H, LAYERS, FF, T, B, P = 43, 64, 4, 4, 256, 64, 32, 0.1


@entry_point("benchmark_chapter")
def main(config: DictConfig) -> None:
    """Run the loop and the runs in turns; print medians and ratios to the plain loop, and save the figures."""
    check_values(config, KEYS)
    plain = "plain loop, 32-true"
    functions = {plain: partial(run_in_new_process, plain_loop, config.epochs)}
    for precision in ["bf16-mixed"] * has_bf16_units("cpu") + ["32-true"]:
        functions[f"scripts/train.py, {precision}"] = partial(time_run, config.epochs, precision)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(config.rounds):
        for name, function in functions.items():
            seconds[name].append(function())
            print(f"round {i + 1} of {config.rounds}: {name}: {seconds[name][-1]:.1f} s", flush=True)
    steps = config.epochs * 39
    machine = describe_device(torch.device("cpu"))
    print(f"\n{machine}, {steps} steps, {config.rounds} rounds")
    print(f"{'':32} ms a step: median (min to max)   ratio to the plain loop: median (min to max)")
    for name, times in seconds.items():
        ms = [1000 * t / steps for t in times]
        ratios = [t / p for t, p in zip(times, seconds[plain], strict=True)]
        print(
            f"{name:32} {median_text(ms, '9.1f')} ({range_text(ms, '.1f')})"
            f"{median_text(ratios, '20.2f')} ({range_text(ratios, '.2f')})"
        )
    save_figures(BENCHMARKS / "chapter.json", {"machine": machine, "steps": steps, "seconds": seconds})
    print(f"figures in {BENCHMARKS / 'chapter.json'}")


def time_run(epochs: int, precision: str) -> float:
    """Return the seconds that a run's training takes, from the first batch to the last checkpoint."""
    overrides = ["callbacks.sample=null", "trainer.accelerator=cpu", f"trainer.max_epochs={epochs}"]
    return train(*overrides, f"trainer.precision={precision}")["training_seconds"]


def plain_loop(epochs: int) -> float:
    """Train as the chapter does; return the seconds that the loop takes."""
    text = (ROOT / "src" / "language_model" / "sonnets.txt").read_text(encoding="utf-8")
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    dataset = TextDataset(torch.tensor([ids[character] for character in text]), T)
    batches = DataLoader(dataset, batch_size=B, shuffle=True, drop_last=True)
    model = PlainGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
    total_steps, step = epochs * len(batches), 0
    start = time.perf_counter()
    for _ in range(epochs):
        epoch_loss = 0.0
        for inputs, targets in batches:
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, 3e-4, total_steps, 50, 1e-5)
            logits = model(inputs)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            epoch_loss += loss.item()
            step += 1
    seconds = time.perf_counter() - start
    print(f"plain loop: mean loss of epoch {epochs}: {epoch_loss / len(batches):.2f}")
    return seconds


class TextDataset(Dataset[tuple[Tensor, Tensor]]):
    """The chapter's data set: serves one window at a time."""

    def __init__(self, token_ids: Tensor, seq_len: int) -> None:
        self.token_ids = token_ids
        self.seq_len = seq_len

    def __len__(self) -> int:
        return len(self.token_ids) - self.seq_len

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor]:
        chunk = self.token_ids[idx : idx + self.seq_len + 1]
        return chunk[:-1], chunk[1:]


class PlainGPT(nn.Module):
    """A GPT of the chapter's sizes, built from PyTorch's own parts."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(T, C)
        self.dropout = nn.Dropout(P)
        self.blocks = nn.Sequential(*(PlainBlock() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(self.dropout(x))))


class PlainBlock(nn.Module):
    """Attention by PyTorch's own function, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.norm2, self.dropout = nn.LayerNorm(C), nn.Dropout(P)
        self.feed_forward = nn.Sequential(nn.Linear(C, FF), nn.GELU(), nn.Linear(FF, C))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q, k, v = (y.view(*x.shape[:2], H, C // H).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=P)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(x.shape)))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


if __name__ == "__main__":
    main()
