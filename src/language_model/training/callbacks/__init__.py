"""What happens beside the training steps, one callback a file; ``conf/callbacks`` names them.

`Console` writes to the terminal, `Throughput` and `GradientNorm` measure, `Sample` generates text, `Dashboard` adds to
TensorBoard, `BestCheckpoint` keeps the best weights, `RestoreBest` brings them back after early stopping.
"""

from language_model.training.callbacks.best_checkpoint import BestCheckpoint as BestCheckpoint
from language_model.training.callbacks.console import Console as Console
from language_model.training.callbacks.dashboard import Dashboard as Dashboard
from language_model.training.callbacks.gradient_norm import GradientNorm as GradientNorm
from language_model.training.callbacks.restore_best import RestoreBest as RestoreBest
from language_model.training.callbacks.sample import Sample as Sample
from language_model.training.callbacks.throughput import Throughput as Throughput
