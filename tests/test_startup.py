import subprocess
import sys

CODE = """
import language_model, lightning, sys
assert not {"matplotlib", "scipy", "transformers"} & sys.modules.keys(), "imported, for nothing"
from torchmetrics import MeanMetric
mean = MeanMetric()
mean.update(3.0)
assert float(mean.compute()) == 3.0
from lightning_utilities.core.imports import RequirementCache, package_available
assert package_available("scipy") and RequirementCache("matplotlib")  # as if nothing had been
"""


def test_lightning_is_imported_without_what_only_torchmetrics_wants() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
