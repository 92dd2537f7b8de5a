"""Make the pictures in docs: the terminal, TensorBoard, a sweep's summary and an exercise, from the shipped sonnets.

python scripts/pictures.py                              all of them
python scripts/pictures.py terminal exercise sweep      some of them

Those of TensorBoard, which belong to the sweep, need Chromium and its driver. All take some minutes on an idle machine.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from PIL import Image
from rich.console import Console

from language_model.files import ROOT

DOCS = ROOT / "docs"
SWEEP = [
    "-m", "optimizer.lr=1e-3,4e-3,1.6e-2", "seed=0,1", "data=text", "data.path=src/language_model/sonnets.txt",
    "model.d_model=32", "model.n_layers=2", "model.max_seq_len=32", "data.stride=8", "data.batch_size=16",
    "trainer.max_epochs=20", "trainer.log_every_n_steps=5",
]  # fmt: skip
PICTURES = ("terminal", "exercise", "sweep")
TABS = {"scalars": "timeseries", "custom_scalars": "custom_scalars", "hparams": "hparams", "text": "text"}


def main() -> None:
    """Train, and write the pictures to docs."""
    wanted = sys.argv[1:] or list(PICTURES)
    if unknown := set(wanted) - set(PICTURES):
        sys.exit(f"error: {' '.join(sorted(unknown))}: there are {', '.join(PICTURES)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "sweep" in wanted:  # first, because it ends here without Chromium
            chromium, driver = find_chromium()
            train(*SWEEP, f"hydra.sweep.dir={folder / 'rates'}")
            save_png(Image.open(folder / "rates" / "summary.png"), DOCS / "summary.png")
            with tensorboard(folder, "rates", num_runs=6) as address, browser(chromium, driver, folder) as screenshot:
                for name, tab in TABS.items():
                    save_png(screenshot(f"{address}/#{tab}"), DOCS / f"tensorboard_{name}.png")
        if "terminal" in wanted:
            draw_terminal("experiment=modern")
        if "exercise" in wanted:
            train("experiment=exercise_3_gradient_norms", f"folder={folder / 'exercise'}")
            save_png(Image.open(folder / "exercise" / "exercise.png"), DOCS / "exercise_3.png")


def train(*overrides: str) -> str:
    """Run scripts/train.py; return what it prints."""
    command = [sys.executable, "scripts/train.py", *overrides]
    print(*command[1:], flush=True)
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def draw_terminal(*overrides: str) -> None:
    """Write ``run.svg``: a command and what it prints."""
    command = " ".join(("python scripts/train.py", *overrides))
    console = Console(record=True, width=112, file=StringIO())
    console.print(f"$ {command}\n{train(*overrides)}", markup=False, highlight=False)
    svg = re.sub(r" *@font-face {.*?}\n", "", console.export_svg(title=command), flags=re.DOTALL)  # no web fonts
    svg = svg.replace("Fira Code, monospace", "monospace")
    (DOCS / "run.svg").write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", "utf-8")


def save_png(picture: Image.Image, file: Path) -> None:
    """Write a picture with 128 colours: a third of the size."""
    picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.relative_to(ROOT)}  {file.stat().st_size / 1000:.0f} kB", flush=True)


@contextmanager
def tensorboard(folder: Path, logdir: str, num_runs: int) -> Iterator[str]:
    """Run TensorBoard; yields its address when it has found all the runs."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--port", str(port)]
    with process([*command, "--host", "127.0.0.1"], cwd=folder):
        wait_for(lambda: len(fetch(f"http://127.0.0.1:{port}/data/runs")) == num_runs)
        yield f"http://127.0.0.1:{port}"


def find_chromium() -> tuple[str, str]:
    """Return the commands of Chromium and its driver."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        sys.exit("error: Chromium and chromedriver are needed, for example Debian's chromium and chromium-driver")
    return chromium, driver


@contextmanager
def browser(chromium: str, driver: str, folder: Path) -> Iterator[Callable[[str], Image.Image]]:
    """Run Chromium by the WebDriver protocol; yields the function that returns a picture of a page."""
    port = free_port()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1600,1000"]
    options = {"binary": chromium, "args": [*flags, f"--user-data-dir={folder / 'profile'}"]}
    with process([driver, f"--port={port}"], cwd=folder):
        session = f"http://127.0.0.1:{port}/session"
        wait_for(lambda: fetch(f"http://127.0.0.1:{port}/status")["value"]["ready"])
        answer = fetch(session, {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        session += f"/{answer['value']['sessionId']}"

        def screenshot(address: str) -> Image.Image:
            fetch(f"{session}/url", {"url": "about:blank"})  # else only the fragment changes
            fetch(f"{session}/url", {"url": address})
            time.sleep(12)  # until everything is loaded and drawn
            return Image.open(BytesIO(b64decode(fetch(f"{session}/screenshot")["value"])))

        try:
            yield screenshot
        finally:
            urlopen(Request(session, method="DELETE")).close()


def fetch(address: str, content: dict[str, Any] | None = None) -> Any:
    """Return the JSON at an address, after posting some if given."""
    data = None if content is None else json.dumps(content).encode()
    with urlopen(Request(address, data, {"Content-Type": "application/json"}), timeout=60) as response:
        return json.load(response)


@contextmanager
def process(command: list[str], cwd: Path) -> Iterator[None]:
    """Run a server until the block ends."""
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            yield
        finally:
            running.terminate()


def wait_for(ready: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a server answers as expected."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if ready():
                return
        except OSError:
            pass
        time.sleep(0.5)
    sys.exit(f"error: a server was not ready after {seconds:.0f} s")


def free_port() -> int:
    """Return a port that no server uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
