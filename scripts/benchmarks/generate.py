"""Time generating with cached keys and values against computing all of them anew for each token, in turns."""

import statistics
import time

import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig

from language_model.model.generate import generate
from language_model.runs.config import entry_point
from language_model.training.hardware import describe_device, device_type


@entry_point("benchmark_generate")
def main(config: DictConfig) -> None:
    """Print the tokens a second of both ways, and their ratio."""
    train = compose("train", [f"model={config.model}", f"model.max_seq_len={config.context}", "vocab_size=65"])
    device = torch.device(device_type("auto"))
    network = instantiate(train.model).eval().to(device)
    prompt = torch.zeros(1, dtype=torch.int64, device=device)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(config.rounds):
        tokens = {}
        for use_cache in (True, False):
            started = time.perf_counter()
            tokens[use_cache] = list(generate(network, prompt, config.max_new_tokens, seed=i, use_cache=use_cache))
            seconds[use_cache].append(time.perf_counter() - started)
        same = "the same tokens" if tokens[True] == tokens[False] else "OTHER TOKENS"
        print(f"round {i + 1}: {seconds[True][-1]:.1f} s cached, {seconds[False][-1]:.1f} s anew, {same}", flush=True)
    ratios = sorted(anew / cached for cached, anew in zip(seconds[True], seconds[False], strict=True))
    print(
        f"{describe_device(device)}, model={config.model}, {config.max_new_tokens} tokens at context {config.context}:"
    )
    for use_cache, name in ((True, "cached"), (False, "anew")):
        print(f"  {name:7} {config.max_new_tokens / statistics.median(seconds[use_cache]):8.0f} tokens/s")
    print(f"  ratio   {statistics.median(ratios):8.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")


if __name__ == "__main__":
    main()
