"""Names in the folders of older runs, and what they are called now."""

from typing import Any

_CALLBACKS = ("Console", "Throughput", "GradientNorm", "RestoreBest", "Sample")

# From classes and functions of earlier versions to those of today.
MOVED = {
    "language_model.gpt.GPT": "language_model.model.gpt.GPT",
    "language_model.data.TextData": "language_model.data.datamodule.TextData",
    "language_model.data.BinData": "language_model.data.datamodule.BinData",
    "language_model.tokenizer.CharTokenizer.of": "language_model.data.tokenizer.CharTokenizer.from_texts",
    "language_model.tokenizer.ByteTokenizer.of": "language_model.data.tokenizer.ByteTokenizer.from_texts",
    "language_model.tokenizer.BPETokenizer.train": "language_model.data.bpe.BPETokenizer.train",
    "language_model.tokenizer.ids": "language_model.data.tokenizer.id_tokenizer",
    "language_model.tokenizer.from_file": "language_model.data.tokenizer_file.tokenizer_from_file",
    "language_model.optim.adamw": "language_model.training.optimizer.adamw",
    "language_model.optim.muon": "language_model.training.optimizer.muon",
    "language_model.schedule.constant": "language_model.training.schedule.constant",
    "language_model.schedule.warmup_cosine": "language_model.training.schedule.warmup_cosine",
    "language_model.schedule.warmup_linear": "language_model.training.schedule.warmup_linear",
    "language_model.checkpoint.AtomicCheckpointIO": "language_model.training.checkpoint.AtomicCheckpointIO",
    "language_model.checkpoint.Last": "language_model.training.checkpoint.LastCheckpoint",
    **{f"language_model.callbacks.{name}": f"language_model.training.callbacks.{name}" for name in _CALLBACKS},
    "language_model.dashboard.Dashboard": "language_model.training.callbacks.Dashboard",
    "language_model.search.Pruning": "language_model.sweeps.pruning.Pruning",
    **{
        f"language_model.exercises.{name}": f"language_model.sweeps.exercises.{name}"
        for name in ("learning_rates", "batch_sizes", "gradient_norms", "early_stopping")
    },
}


def with_new_names(settings: Any) -> Any:
    """Return settings of any nesting (or a list of overrides) with the names of today."""
    if isinstance(settings, dict):
        renamed = {key: with_new_names(value) for key, value in settings.items()}
        for key in ("attention", "model.attention"):
            if renamed.get(key) == "plain":
                renamed[key] = "unfused"
        return renamed
    if isinstance(settings, list):
        return [with_new_names(value) for value in settings]
    if not isinstance(settings, str):
        return settings
    key, equals, value = settings.rpartition("=")  # an override, or a value alone
    value = "unfused" if (key, value) == ("model.attention", "plain") else MOVED.get(value, value)
    return f"{key}{equals}{value}"
