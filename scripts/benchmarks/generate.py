"""Compare the speed of generating with and without the cache of keys and values, in turns."""

import time

import torch
from hydra import compose
from hydra.utils import instantiate
from measure import median_text, range_text
from omegaconf import DictConfig
from pydantic import PositiveInt

from language_model.model.generate import generate
from language_model.runs.command_line import entry_point
from language_model.runs.config import check_values
from language_model.training.hardware import describe_device, device_type

KEYS = {"size": str, "context": PositiveInt, "max_new_tokens": PositiveInt, "rounds": PositiveInt}


@entry_point("benchmark_generate")
def main(config: DictConfig) -> None:
    """Print the tokens per second with and without the cache, and the ratio."""
    check_values(config, KEYS)
    train = compose("train", [f"model={config.size}", f"model.max_seq_len={config.context}", "vocab_size=65"])
    device = torch.device(device_type("auto"))
    network = instantiate(train.model).eval().to(device)
    prompt = torch.zeros(1, dtype=torch.int64, device=device)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(config.rounds):
        tokens = {}
        for use_cache in (True, False):
            start = time.perf_counter()
            tokens[use_cache] = list(generate(network, prompt, config.max_new_tokens, seed=i, use_cache=use_cache))
            seconds[use_cache].append(time.perf_counter() - start)
        same = "the same tokens" if tokens[True] == tokens[False] else "DIFFERENT TOKENS"
        times = f"{seconds[True][-1]:.1f} s with the cache, {seconds[False][-1]:.1f} s without"
        print(f"round {i + 1}: {times}, {same}", flush=True)
    ratios = [without / cached for cached, without in zip(seconds[True], seconds[False], strict=True)]
    print(
        f"{describe_device(device)}, model={config.size}, {config.max_new_tokens} tokens at context {config.context}:"
    )
    for use_cache, name in ((True, "with cache"), (False, "without")):
        speeds = [config.max_new_tokens / each for each in seconds[use_cache]]
        print(f"  {name:10} {median_text(speeds, '8.0f')} tokens/s")
    print(f"  {'ratio':10} {median_text(ratios, '8.1f')} ({range_text(ratios, '.1f')})")


if __name__ == "__main__":
    main()
