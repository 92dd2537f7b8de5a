"""A quicker start: a second or two less for every command."""

import sys
from collections.abc import Sequence
from importlib import metadata, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# What torchmetrics imports wherever it is installed, for metrics of sound, pictures and translations.
NOT_NEEDED = ("matplotlib", "scipy", "transformers")


class QuickTorchmetrics(MetaPathFinder):
    """Keeps torchmetrics, which lightning imports, from finding NOT_NEEDED while it is imported itself.

    Its metrics that want one of these then say that it is not installed; whatever else looks for them finds them.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find torchmetrics as ever, but import it differently."""
        if fullname != "torchmetrics":
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec("torchmetrics")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: self.without(NOT_NEEDED, execute, module)  # type: ignore
        return spec

    @staticmethod
    def without(packages: Sequence[str], execute: Any, module: ModuleType) -> None:
        """Execute a module while the functions that it looks for packages with do not see these."""
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
