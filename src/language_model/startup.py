"""A faster start: a second or two less for every command."""

import sys
from collections.abc import Sequence
from importlib import metadata, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Packages that torchmetrics imports if they are installed, for metrics of audio, images and translations.
SKIPPED = ("matplotlib", "scipy", "transformers")


class QuickTorchmetrics(MetaPathFinder):
    """Hides the SKIPPED packages from torchmetrics, which lightning imports, while torchmetrics is being imported.

    Its metrics that need them then say that they are not installed. All other code finds them as usual.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find torchmetrics as usual, but with another way of executing it."""
        if fullname != "torchmetrics":
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec("torchmetrics")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: self.without(SKIPPED, execute, module)  # type: ignore
        return spec

    @staticmethod
    def without(packages: Sequence[str], execute: Any, module: ModuleType) -> None:
        """Execute a module while lightning_utilities' package checks do not see these packages."""
        from lightning_utilities.core import imports

        found = {name: getattr(imports, name, None) for name in ("find_spec", "_version")}

        def find_spec(name: str) -> Any:
            return None if name in packages else util.find_spec(name)

        def version(name: str) -> str:
            if name in packages:
                raise metadata.PackageNotFoundError(name)
            return metadata.version(name)

        if all(found.values()):
            vars(imports).update(find_spec=find_spec, _version=version)
        try:
            execute(module)
        finally:
            vars(imports).update(found)
            imports.package_available.cache_clear()
            imports.module_available.cache_clear()
