"""The chapter's four exercises: the results in the chapter's form, beside what it expects, and a plot.

Each function takes the folder to write to and the exercise's runs, and writes ``exercise.md`` and ``exercise.png``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from language_model.files import display_path, write_text
from language_model.pages.plots import figure, read_points
from language_model.runs.folder import read_settings
from language_model.runs.monitor import sign_of
from language_model.runs.records import read_result
from language_model.sweeps.summary import markdown_line
from language_model.terminal import log, terminal

LOSS = "train/loss_epoch"


def learning_rates(folder: Path, runs: Sequence[Path]) -> None:
    """Exercise 1: the final loss for each rate."""
    expected = {
        1e-2: "NaN or very high (training exploded)",
        3e-4: "~1.5-2.0 (good convergence)",
        1e-6: "~3.7-3.9 (barely learned anything)",
    }
    runs = sorted_by("optimizer.lr", runs, reverse=True)
    lines = []
    for run in runs:
        lr = read_settings(run)["optimizer.lr"]
        lines.append((f"LR={lr:.0e} → Final loss: {final_loss(run)}", expected.get(lr, "–")))
    write_table(folder, "Exercise 1: learning rates", lines)
    draw_losses(folder, {f"lr {read_settings(run)['optimizer.lr']:.0e}": run for run in runs})


def batch_sizes(folder: Path, runs: Sequence[Path]) -> None:
    """Exercise 2: the final loss, the steps and the time for each batch size."""
    expected = {
        4: "~0.8, Steps/epoch: 240, Time: ~25s (many steps, slower)",
        16: "~1.0, Steps/epoch: 60, Time: ~12s (good balance)",
        64: "~1.5, Steps/epoch: 15, Time: ~6s (fewer steps, may underfit)",
    }
    runs = sorted_by("data.batch_size", runs)
    lines = []
    for run in runs:
        size, result = read_settings(run)["data.batch_size"], read_result(run)
        steps = result.get("steps", 0) // max(1, result.get("epochs", 1))
        time = f"{result.get('seconds', 0.0):.1f}s"
        line = f"Batch size={size:2d} → Loss: {final_loss(run)}, Steps/epoch: {steps}, Time: {time}"
        lines.append((line, f"Loss: {expected[size]}" if size in expected else "–"))
    write_table(folder, "Exercise 2: batch sizes", lines)
    draw_losses(folder, {f"batch size {read_settings(run)['data.batch_size']}": run for run in runs})


def gradient_norms(folder: Path, runs: Sequence[Path]) -> None:
    """Exercise 3: the gradient norm at every step, before clipping."""
    run = runs[0]
    clip = read_settings(run)["trainer.gradient_clip_val"] or float("inf")
    steps, norms = read_points(run, "train/grad_norm")
    clipped = sum(norm > clip for norm in norms)
    largest, when = max(zip(norms, steps, strict=True))
    tenth = max(1, len(norms) // 10)
    early, late = sum(norms[:tenth]) / tenth, sum(norms[-tenth:]) / tenth
    lines = [
        (f"Total steps: {len(norms)}", "–"),
        (f"Clipped steps: {clipped} ({clipped / len(norms):.1%})", "most of them early"),
        (
            f"Max gradient norm: {largest:.4f} (step {when:.0f})",
            "in the first few hundred steps",
        ),
        (f"Mean gradient norm: {sum(norms) / len(norms):.4f}", "–"),
        (f"First tenth: {early:.4f}, last tenth: {late:.4f}", "decreasing as training progresses"),
        (f"Final gradient norm: {norms[-1]:.4f}", "–"),
    ]
    write_table(folder, "Exercise 3: gradient norms", lines)
    with figure(folder / "exercise.png", width=8) as (axis,):
        axis.plot(steps, norms, linewidth=0.8, label="gradient norm before clipping")
        if clip < float("inf"):
            axis.axhline(clip, color="C3", linewidth=1, label=f"clip {clip:g}")
        axis.set(xlabel="step", ylabel="gradient norm", yscale="log")
        axis.legend(frameon=False)


def early_stopping(folder: Path, runs: Sequence[Path]) -> None:
    """Exercise 4: the epoch at which the loss stopped improving, and the best loss."""
    run, result = runs[0], read_result(runs[0])
    settings = read_settings(run)
    monitor, max_epochs, sign = settings["monitor"], settings["trainer.max_epochs"], sign_of(settings["monitor_mode"])
    _, losses = read_points(run, monitor)
    best, waited, lines = sign * float("inf"), 0, []
    for epoch, loss in enumerate(losses):
        best, waited = (loss, 0) if sign * loss < sign * best else (best, waited + 1)
        if epoch % 5 == 0:
            lines.append((f"Epoch {epoch:3d} | Loss: {loss:.4f} | No improvement for: {waited} epochs", "–"))
    if "stopped_early" in result:
        lines.append((f"Early stopping at epoch {len(losses) - 1}!", "the loss stops improving before epoch 100"))
    else:
        lines.append(
            (f"Completed all {max_epochs} epochs without early stopping.", "the loss stops improving before then")
        )
    restored = " (weights restored)" if result.get("restored_best") else ""
    of = f"{best:.4f}, of epoch {losses.index(best)}{restored}" if losses else "none, no epoch was finished"
    lines.append((f"Best loss: {of}", "the best weights are restored"))
    write_table(folder, "Exercise 4: early stopping", lines)
    with figure(folder / "exercise.png", width=8) as (axis,):
        axis.plot(range(len(losses)), losses)
        if losses:
            axis.plot(losses.index(best), best, "o", color="C3", label=f"best: {best:.4f}, epoch {losses.index(best)}")
            axis.legend(frameon=False)
        axis.set(xlabel="epoch", ylabel=monitor)


def sorted_by(key: str, runs: Sequence[Path], reverse: bool = False) -> list[Path]:
    """Return the runs that started, sorted by a setting, then by seed."""
    begun = [run for run in runs if read_settings(run)]
    return sorted(begun, key=lambda run: (read_settings(run)[key], read_settings(run)["seed"]), reverse=reverse)


def final_loss(run: Path) -> str:
    """Return the mean loss of a run's last epoch; NaN if a gradient was not finite."""
    loss = read_points(run, LOSS)[1]
    non_finite = "NonFiniteError" in read_result(run).get("error", "")
    return "NaN" if non_finite or not loss else f"{loss[-1]:.4f}"


def write_table(folder: Path, title: str, lines: Sequence[tuple[str, str]]) -> None:
    """Print the results beside what the chapter expects, and write them to ``exercise.md``."""
    heading = ("result", "the chapter expects")
    table = Table(*(Column(name, no_wrap=True) for name in heading), title=title, title_justify="left")
    for line in lines:
        table.add_row(*line)
    log.info("")
    terminal.print(table, soft_wrap=True)
    rows = [markdown_line(line) for line in (heading, ("---", "---"), *lines)]
    page = [f"# {title}", "", *rows, "", "![the result](exercise.png)", ""]
    write_text(folder / "exercise.md", "\n".join(page))
    log.info(f"exercise {display_path(folder / 'exercise.md')}, .png")


def draw_losses(folder: Path, runs: dict[str, Any]) -> None:
    """Draw the loss over the epochs of each run."""
    with figure(folder / "exercise.png", width=8) as (axis,):
        for label, run in runs.items():
            losses = read_points(run, LOSS)[1]
            axis.plot(range(len(losses)), losses, label=label)
        axis.set(xlabel="epoch", ylabel="training loss, mean of the epoch")
        axis.legend(frameon=False)
