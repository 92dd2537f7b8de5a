"""Text that the model generates while it trains."""

from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from pydantic import Field, PositiveInt

from language_model.model.generate import generate
from language_model.training.callbacks.restore_best import RestoreBest


class Sample(Callback):
    """Generates text after a prompt: for TensorBoard at some validations, and for the result at the end.

    Args:
        every_n_steps: optimizer steps between samples; each is written at the next validation. None: only at the end.
        prompt: the text to continue; null for the first two words of the corpus.
        max_new_tokens: length of the continuation.
        temperature: 0 for the most likely token each time, 1 for the model's own probabilities.
        top_k: sample from the k most likely tokens only; null for all.
        seed: of the sampling.

    Attributes:
        text: the last sample.
        description: its prompt, its settings and its weights.
    """

    def __init__(
        self,
        every_n_steps: PositiveInt | None = 500,
        prompt: Annotated[str, Field(min_length=1)] | None = None,
        max_new_tokens: PositiveInt = 200,
        temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8,
        top_k: PositiveInt | None = None,
        seed: Annotated[int, Field(ge=0, lt=2**32)] = 0,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed
        self.text = ""
        self.description = ""
        self._validated_step = 0  # of the validation before this one

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

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Note the step of the validation before."""
        self._validated_step = pl_module.validated_step or 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Add a sample to TensorBoard, if the steps since the validation before complete another `every_n_steps`."""
        if self.every_n_steps is None or trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.loggers:
            return
        if trainer.global_step // self.every_n_steps > self._validated_step // self.every_n_steps:
            self._write_sample(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Generate the last sample."""
        pl_module.to(trainer.strategy.root_device)  # lightning has moved it to the CPU
        self._write_sample(trainer, pl_module)

    def _write_sample(self, trainer: L.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule
        prompt = self.prompt or data.default_prompt
        if not hasattr(pl_module.network, "max_seq_len"):
            pl_module.network.max_seq_len = data.seq_len
        self.text = self.generate_sample(pl_module.network, data.tokenizer, prompt)
        restored = next((c.restored_step for c in trainer.callbacks if isinstance(c, RestoreBest)), None)
        weights = f"last weights (step {trainer.global_step:,})"
        if restored is not None:
            weights = f"best weights (step {restored:,})"
        top_k = f", top_k {self.top_k}" if self.top_k else ""
        self.description = f"prompt {prompt!r}, temperature {self.temperature:g}{top_k}, {weights}"
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text("sample", f"```\n{self.text}\n```", trainer.global_step)
