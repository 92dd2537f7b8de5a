"""Generate text with a trained model. Needs only the run's folder.

`python scripts/generate.py run=latest prompt="Shall I"`; `--help` shows every key.
"""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig
from pydantic import Field, PositiveInt

from language_model.runs.command_line import entry_point
from language_model.runs.config import ConfigError, check_values, errors_for_key
from language_model.terminal import log

KEYS = {
    "run": str | int,
    "checkpoint": str,
    "prompt": str | int | float | bool | None,
    "prompt_file": str | None,
    "max_new_tokens": PositiveInt,
    "temperature": Annotated[float, Field(ge=0, allow_inf_nan=False)],
    "top_k": PositiveInt | None,
    "top_p": Annotated[float, Field(gt=0, le=1)] | None,
    "num_samples": PositiveInt,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],
    "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps"],
}


@entry_point("generate", literal=("prompt",))
def main(config: DictConfig) -> None:
    """Generate samples, and print each token as soon as it is sampled."""
    check_values(config, KEYS)
    log.handlers, log.propagate = [logging.StreamHandler()], False  # stderr: the text alone is on stdout
    log.setLevel(logging.INFO)
    import numpy as np
    import torch

    from language_model.model.generate import generate, stream_decode
    from language_model.runs.load import load_run
    from language_model.training.hardware import find_device

    with errors_for_key(f"accelerator={config.accelerator}"):
        device = find_device(config.accelerator)
    loaded = load_run(str(config.run), config.checkpoint, device)
    network: Any = loaded.network
    tokenizer = loaded.tokenizer
    text = read_prompt(config)
    with errors_for_key("prompt"):
        if text is None and tokenizer.end_of_text is not None:  # a document begins after this token
            text, ids = "", np.array([tokenizer.end_of_text])
        else:
            text = tokenizer.decode([0]) if text is None else text
            ids = tokenizer.encode(text)
        if len(ids) == 0:
            raise ValueError("it is empty; at least one token is needed")
    tokens = torch.tensor(ids, dtype=torch.int64, device=device)
    for i in range(config.num_samples):
        if i:
            print("\n" + "-" * 80)
        settings = (config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.seed + i)
        new = generate(network, tokens, *settings, tokenizer.vocab_size, tokenizer.end_of_text)
        print(text, end="", flush=True)
        for piece in stream_decode(tokenizer.decode, new):
            print(piece, end="", flush=True)
    print()


def read_prompt(config: DictConfig) -> str | None:
    """Return the prompt, from the command line, a file or standard input; None if none is given."""
    if config.prompt is not None and config.prompt_file is not None:
        raise ConfigError("prompt and prompt_file: one of them is enough")
    if config.prompt_file is not None:
        with errors_for_key("prompt_file"):
            return Path(config.prompt_file).read_text(encoding="utf-8")
    return sys.stdin.read() if config.prompt == "-" else None if config.prompt is None else str(config.prompt)


if __name__ == "__main__":
    main()
