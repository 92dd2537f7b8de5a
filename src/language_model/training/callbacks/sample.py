"""Text that the model generates while it trains."""

from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from pydantic import Field, NonNegativeFloat, PositiveInt

from language_model.model.generate import generate


class Sample(Callback):
    """Generates text after a prompt: for TensorBoard at each validation, and for the result at the end.

    Args:
        prompt: the text to continue; null for the first two words of the corpus.
        max_new_tokens: length of the continuation.
        temperature: 0 for the most likely token each time, 1 for the model's own probabilities.
        top_k: sample from the k most likely tokens only; null for all.
        seed: of the sampling.
    """

    def __init__(
        self,
        prompt: Annotated[str, Field(min_length=1)] | None = None,
        max_new_tokens: PositiveInt = 200,
        temperature: NonNegativeFloat = 0.8,
        top_k: PositiveInt | None = None,
        seed: int = 0,
    ) -> None:
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed
        self.text = ""

    def generate_sample(self, network: Any, tokenizer: Any, prompt: str) -> str:
        """Return the prompt and the network's continuation."""
        device = next(network.parameters()).device
        tokens = torch.tensor(tokenizer.encode(prompt), dtype=torch.int64, device=device)
        training = network.training
        network.eval()
        sampling = (self.temperature, self.top_k, None, self.seed)
        new = generate(network, tokens, self.max_new_tokens, *sampling, tokenizer.vocab_size, tokenizer.end_of_text)
        ids = list(new)
        network.train(training)
        return prompt + tokenizer.decode(ids)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Add a sample to TensorBoard."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.loggers:
            self._write_sample(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Generate the last sample."""
        pl_module.to(trainer.strategy.root_device)  # lightning has moved it to the CPU
        self._write_sample(trainer, pl_module)

    def _write_sample(self, trainer: L.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule
        self.text = self.generate_sample(pl_module.network, data.tokenizer, self.prompt or data.default_prompt)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text("sample", f"```\n{self.text}\n```", trainer.global_step)
