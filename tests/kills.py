"""Kill real runs at random moments, resume them, and compare what they come to with runs that were left alone.

`python tests/kills.py 100` does so a hundred times; `--end` kills at each place after the training instead. One
process imports the stack and forks for each run, so that a kill takes a second or two; the runs are `scripts/train.py`,
whole.
"""

import argparse
import csv
import importlib
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from language_model.runs import announce, fit
from language_model.training import module
from language_model.training.callbacks import Sample

for name in ("runs.fit", "runs.announce", "training.checkpoint", "training.callbacks", "sweeps.pruning"):
    importlib.import_module(f"language_model.{name}")  # once, before the forks

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "data=text", "model.d_model=16", "model.n_heads=2", "model.n_layers=2", "model.d_ff=16", "model.max_seq_len=16",
    "data.batch_size=8", "trainer.accelerator=cpu", "callbacks.sample.max_new_tokens=8", "schedule.warmup_steps=2",
    "trainer.log_every_n_steps=3", "optimizer.lr=0.01", "model.dropout=0.2",
]  # fmt: skip
RECIPES = {
    "epochs": ["trainer.max_epochs=3", "callbacks.last.every_n_steps=5"],
    "steps": [
        "trainer.max_epochs=-1", "trainer.max_steps=25", "trainer.accumulate_grad_batches=4", "data.num_workers=2",
        "trainer.val_check_interval=6", "trainer.check_val_every_n_epoch=null", "callbacks.last.every_n_steps=3",
    ],
    "early stopping": [
        "trainer.max_epochs=20", "callbacks.early_stopping.patience=1", "optimizer.lr=0.1",
        "trainer.val_check_interval=0.25", "callbacks.last.every_n_steps=7", "tokenizer=byte",
    ],
}  # fmt: skip
# Where a run is killed: a method that is called, or a moment within a save.
PLACES = [
    "training_step", "validation_step", "configure_gradient_clipping", "on_train_batch_end", "write", "fsync", "moved",
]  # fmt: skip
# After the last save: what is left is the last sample, the row in HPARAMS and result.json. True: when that is done.
END_PLACES: dict[str, tuple[Any, str, bool]] = {
    "before the last sample": (Sample, "on_fit_end", False),
    "after the last sample": (Sample, "on_fit_end", True),
    "before HPARAMS": (announce, "log_hyperparameters", False),
    "after HPARAMS": (announce, "log_hyperparameters", True),
    "after result.json": (fit, "write_result", True),
}


# What a run's state has of these; and current_score, which lightning's ModelCheckpoint saves and never restores.
PLACES_AND_TIMES = ("dirpath", "best_model_path", "best_k_models", "kth_best_model_path", "last_model_path")
PLACES_AND_TIMES += ("seconds", "current_score")


def train(folder: Path, overrides: list[str], kill: tuple[str, int, int] | None = None) -> int:
    """Run scripts/train.py in a fork, killed at the n-th time that it comes to a place; return its status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            output = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(1)
            if kill:
                arm(*kill)
            sys.argv = ["train.py", f"folder={folder}", *SMALL, *overrides]
            runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
            status = 0
        except SystemExit as stopped:
            if isinstance(stopped.code, str):
                print(stopped.code)
            status = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def arm(place: str, count: int, signum: int) -> None:
    """Send this process a signal when it comes to a place for the count-th time."""
    left = iter([*[False] * (count - 1), True])

    def come() -> None:
        if next(left, False):
            os.kill(os.getpid(), signum)

    if place == "write":
        save = torch.save

        def save_half(content: Any, file: Any) -> None:
            save(content, file)
            file.truncate(file.tell() // 2)
            come()
            file.seek(0)
            save(content, file)

        torch.save = save_half
    elif place == "fsync":
        fsync = os.fsync
        os.fsync = lambda descriptor: (come(), fsync(descriptor))[1]
    elif place == "moved":
        replace = Path.replace
        Path.replace = lambda self, target: (replace(self, target), come())[0]
    elif place in END_PLACES:
        owner, name, done = END_PLACES[place]
        function = getattr(owner, name)
        if done:
            setattr(owner, name, lambda *a, **k: (function(*a, **k), come())[0])
        else:
            setattr(owner, name, lambda *a, **k: (come(), function(*a, **k))[1])
    else:
        method = getattr(module.LanguageModel, place)
        setattr(module.LanguageModel, place, lambda self, *a, **k: (come(), method(self, *a, **k))[1])


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that a run has come to, but for times and places."""
    last, best = (torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    for name, state in last["callbacks"].items():
        for key in PLACES_AND_TIMES:
            state.pop(key, None)
        last["callbacks"][name] = state
    for name in ("logs", "seconds"):
        last.pop(name)
    last["metrics"].pop("train/tokens_per_sec", None)
    with (folder / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if "tokens_per_sec" not in k} for row in csv.DictReader(file)]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    scalars.pop("watch/tokens_per_sec", None)
    result = json.loads((folder / "result.json").read_text())
    kept = ("status", "metrics", "steps", "epochs", "best", "grad_norm_max", "clipped_share", "sample", "tokens")
    said = {key: result.get(key) for key in kept}
    said["metrics"].pop("train/tokens_per_sec", None)
    texts = {tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    start = b"_hparams_/session_start_info"
    hparams = sum(file.read_bytes().count(start) for file in folder.glob("events.*"))
    logged = {"rows": rows, "scalars": scalars, "texts": texts, "hparams": hparams}
    return {"last": last, "best": best["state_dict"], "result": said, **logged}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return where two outcomes differ."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i in range(len(a)) for found in differences(a[i], b[i], f"{path}/{i}")]
    return [] if type(a) is type(b) and (a == b or a != a) else [f"{path}: {str(a)[:60]} and {str(b)[:60]}"]


Kill = tuple[str, int, int]  # place, count, signal


def random_kills(count: int, seed: int) -> list[tuple[str, list[Kill]]]:
    """Return recipes, each with the one or two kills that a run of it gets."""
    generator = random.Random(seed)
    chosen = []
    for i in range(count):
        name = generator.choice(list(RECIPES))
        kills = [] if i else [("fsync", 1, signal.SIGKILL)]  # once for sure: metrics are on disk, no checkpoint is
        for _ in range(generator.choice([1, 1, 2])):
            place = generator.choice(PLACES)
            most = {"training_step": 90, "configure_gradient_clipping": 25, "on_train_batch_end": 90}.get(place, 12)
            signum = signal.SIGKILL
            if place.endswith("step") and generator.random() < 0.3:
                signum = generator.choice([signal.SIGTERM, signal.SIGINT])
            kills.append((place, generator.randint(1, most), signum))
        chosen.append((name, kills))
    return chosen


def kills_at_the_end() -> list[tuple[str, list[Kill]]]:
    """Return every recipe with every place after its training."""
    return [(name, [(place, 1, signal.SIGKILL)]) for name in RECIPES for place in END_PLACES]


def main(chosen: list[tuple[str, list[Kill]]], folder: Path) -> int:
    """Kill and resume runs; return how many came to something else."""
    text = folder / "text.txt"
    text.write_text("".join(chr(97 + (i * i * 7 + i // 13) % 26) for i in range(6_000)))
    data = [f"data.path={text}", f"data.cache={folder / 'cache'}"]
    whole = {}
    for name in dict.fromkeys(name for name, _ in chosen):
        place, overrides = folder / name.replace(" ", "_"), RECIPES[name]
        assert train(place, [*data, *overrides]) == 0, place.with_suffix(".log").read_text()
        whole[name] = outcome(place)
    other = 0
    for i, (name, kills) in enumerate(chosen):
        run = folder / "killed"
        shutil.rmtree(run, ignore_errors=True)
        run.with_suffix(".log").unlink(missing_ok=True)
        statuses = [train(run, [*data, *RECIPES[name]], kill) for kill in kills]
        statuses.append(train(run, [*data, *RECIPES[name]]))
        assert all(status in (-9, 0, 130, 143) for status in statuses), run.with_suffix(".log").read_text()
        found = differences(whole[name], outcome(run)) if statuses[-1] == 0 else [run.with_suffix(".log").read_text()]
        other += bool(found)
        how = ", ".join(f"{signum.name} at {place} {n}" for place, n, signum in kills)
        print(f"{i + 1:3} {name}: {how}: {found[:4] if found else 'identical'} {statuses}", flush=True)
    count = len(chosen)
    print(f"{count - other} of {count} killed and resumed runs came to the same bits as the runs left alone")
    return other


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=0)
    parser.add_argument("--end", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        chosen = kills_at_the_end() if arguments.end else random_kills(arguments.count, arguments.seed)
        sys.exit(main(chosen, Path(temporary)) > 0)
