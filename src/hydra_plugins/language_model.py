"""The project's sweepers, in the place where Hydra looks for plugins.

Hydra imports this at every start, so everything that takes time to import is in `language_model.sweeps`.
"""

import pkgutil
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class Grid(Sweeper):
    """Runs every combination of the values given."""

    work = "language_model.sweeps.grid.grid"
    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what Hydra gives, and create its launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep: call the function named by `work`."""
        from language_model.runs.config import check_node
        from language_model.sweeps.sweep import Sweep

        given: Any = OmegaConf.to_container(self.config.hydra.sweeper, resolve=True)
        settings = given | {"_target_": self.work}
        check_node("hydra.sweeper", settings)
        sweep = Sweep(self.config, self.hydra_context.config_loader, self.launcher)
        pkgutil.resolve_name(self.work)(sweep, arguments, **{k: v for k, v in settings.items() if k[0] != "_"})


class Search(Grid):
    """Tries values from the spaces given."""

    work = "language_model.sweeps.search.search"
