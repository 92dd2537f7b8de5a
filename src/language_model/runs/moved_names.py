"""Names in the folders of older runs and sweeps, and the current ones."""

import re
from typing import Any

# Modules that have moved inside the package.
MODULES = {
    "gpt": "model.gpt",
    "tokenizer": "data.tokenizer",
    "optim": "training.optimizer",
    "schedule": "training.schedule",
    "checkpoint": "training.checkpoint",
    "callbacks": "training.callbacks",
    "dashboard": "training.callbacks",
    "exercises": "sweeps.exercises",
}
# Classes and functions that have moved to other modules, or have other names.
MOVED = {
    "data.TextData": "data.datamodule.TextData",
    "data.BinData": "data.datamodule.BinData",
    "data.TokenData": "data.datamodule.TokenData",
    "tokenizer.CharTokenizer.of": "data.tokenizer.CharTokenizer.from_texts",
    "tokenizer.ByteTokenizer.of": "data.tokenizer.ByteTokenizer.from_texts",
    "tokenizer.BPETokenizer.train": "data.bpe.BPETokenizer.train",
    "tokenizer.ids": "data.tokenizer.id_tokenizer",
    "tokenizer.from_file": "data.tokenizer_file.tokenizer_from_file",
    "checkpoint.Last": "training.checkpoint.LastCheckpoint",
    "search.Pruning": "sweeps.pruning.Pruning",
}
# Lightning's classes in older runs, and what stands in their place.
REPLACED = {
    "lightning.pytorch.loggers.TensorBoardLogger": "language_model.training.log_files.EventLogger",
    "lightning.pytorch.loggers.CSVLogger": "language_model.training.log_files.TableLogger",
}


def with_current_names(settings: Any) -> Any:
    """Return settings of any nesting, or a list of overrides, with the current names."""
    if isinstance(settings, dict):
        return {key: _rename_value(key, with_current_names(value)) for key, value in settings.items()}
    if isinstance(settings, list):
        return [with_current_names(value) for value in settings]
    if not isinstance(settings, str):
        return settings
    if settings in REPLACED:
        return REPLACED[settings]
    settings = re.sub(r"^([+~]*model\.attention=['\"]?)plain\b", r"\1unfused", settings)
    return re.sub(r"\blanguage_model\.(\w+)\.(\w+(?:\.\w+)*)", _rename, settings)


def _rename(name: re.Match[str]) -> str:
    module, rest = name.groups()
    if module not in MODULES and f"{module}.{rest}" not in MOVED:
        return name[0]
    return "language_model." + MOVED.get(f"{module}.{rest}", f"{MODULES.get(module)}.{rest}")


def _rename_value(key: str, value: Any) -> Any:
    if key not in ("attention", "model.attention"):
        return value
    if isinstance(value, list):  # what a sweep was asked for
        return [_rename_value(key, each) for each in value]
    return "unfused" if value == "plain" else value
