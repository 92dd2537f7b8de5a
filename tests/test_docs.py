"""README.md and docs: their examples are executed, their commands accepted, and what they link to exists.

test_extend.py executes docs/extend.md.
"""

import re
import runpy
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from conftest import ROOT, TINY, Run, Script
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from language_model.runs import folder
from language_model.runs.command_line import quote_override
from language_model.runs.config import check_config, check_values

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
EXECUTED = [page for page in PAGES if page.name != "extend.md" and "```python" in page.read_text("utf-8")]


def commands(text: str) -> list[str]:
    """Return a page's commands that start with ``python``, without comments: in sh and console blocks, and inline.

    Inline, ``python`` may be left out where overrides follow the script.
    """
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`(python scripts/[^`]+)`", inline)
    lines += [f"python {command}" for command in re.findall(r"`(scripts/\S+\.py [^`]+)`", inline)]
    found = [line.removeprefix("$ ").strip() for line in lines]
    return [shlex.join(shlex.split(line, comments=True)) for line in found if line.startswith("python ")]


COMMANDS = dict.fromkeys(
    command for page in PAGES if page.name != "extend.md" for command in commands(page.read_text("utf-8"))
)


def overrides_of(command: str) -> tuple[str, list[str]]:
    """Return a command's script, without the suffix, and its overrides, the first value of each list."""
    _, script, *arguments = shlex.split(command)
    values = [argument for argument in arguments if "=" in argument]
    if "-m" in arguments:
        values = [re.sub(r"=([^,()\[\]]+),[^()\[\]]*$", r"=\1", value) for value in values]
        values = [value for value in values if "(" not in value]  # search spaces: test_search.py
    return script, [quote_override(value, ("prompt",)) for value in values]


def run_and_compare(example: Example) -> str | None:
    """Execute a block; return what is wrong if its prints differ from the comments behind and below them."""
    printed: list[str] = []
    example.namespace["print"] = lambda *values: printed.append(" ".join(map(str, values)))
    PythonEvaluator()(example)
    expected = re.findall(r"^(?:\s*print\(.*\)  )?# (.*)$", example.parsed, re.M)
    return None if printed == expected else f"printed {printed}, the page says {expected}"


class Blocks(PythonCodeBlockParser):
    """Python blocks: doctest sessions, or code with its output in comments."""

    def __init__(self) -> None:
        super().__init__()
        self.codeblock_parser = CodeBlockParser("python", run_and_compare)


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: page.name)
def test_the_examples_print_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "tests" / "stored_run", tmp_path / "runs" / "stored")
    shutil.copy(tmp_path / "runs/stored/checkpoints/last.ckpt", tmp_path / "runs/stored/checkpoints/best.ckpt")
    monkeypatch.setattr(folder, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(folder, "SWEEPS", tmp_path / "none")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    document = Sybil([Blocks()]).parse(page)
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("command", [command for command in COMMANDS if "scripts/" in command])
def test_every_command_is_one_that_the_script_takes(command: str) -> None:
    script, overrides = overrides_of(command)
    name = script.removeprefix("scripts/").removesuffix(".py").replace("benchmarks/", "benchmark_")
    assert (ROOT / script).is_file()
    hydras = [override for override in overrides if override.startswith("hydra")]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose(name, [override for override in overrides if override not in hydras])
        if name in ("train", "prepare"):
            check_config(config)
        elif (keys := runpy.run_path(str(ROOT / script)).get("KEYS")) and overrides:
            check_values(config, keys)
    check_hydras_own(hydras)


def unexplained_tables(text: str) -> list[str]:
    """Return the headings of a page's sections that have a table of measured figures and no command of a script.

    A figure counts as measured if it has a decimal point or a unit, outside of code and of addresses.
    """
    sections, fenced = [""], False
    for line in text.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        sections += [""] if line.startswith("#") and not fenced else []
        sections[-1] += line
    found = []
    for section in sections:
        rows = "\n".join(re.findall(r"^\|.*$", section, re.M))
        cells = re.sub(r"`[^`]*`|\]\([^)]*\)", "", rows)
        measured = re.search(r"\d\.\d|\d ?%|\d (?:ms|µs|s|min|minutes|MB|GB)\b", cells)
        if measured and not any("scripts/" in command for command in commands(section)):
            found.append(section.partition("\n")[0])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_of_figures_names_its_command(page: Path) -> None:
    """In the same section. That the script takes the command is tested above."""
    assert unexplained_tables(page.read_text("utf-8")) == []


def test_a_table_of_figures_without_a_command_is_found() -> None:
    explained = "## More\n```sh\n# not a heading\npython scripts/train.py\n```\n| 2 s |\n"
    assert unexplained_tables(f"# Speed\n\n| `model=nano` | 1.5 |\n{explained}") == ["# Speed"]
    assert unexplained_tables("| see [speed](1.5.md) | `lr=0.1` | 3 layers |") == []


def check_hydras_own(overrides: list[str]) -> None:
    """Check ``hydra/launcher=...`` and the like by their files: the packages of some are not installed."""
    nodes = {}
    for group, _, choice in (override.partition("=") for override in overrides):
        if "/" in group:
            nodes[group.replace("/", ".")] = OmegaConf.load(ROOT / "conf" / group / f"{choice}.yaml")
        else:
            node, _, key = group.rpartition(".")
            assert key in nodes[node] or "defaults" in nodes[node], f"{group} is not in the file"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_choice_that_a_page_names_exists(page: Path) -> None:
    """`model=nano` in a sentence: conf/model/nano.yaml. Names that docs/extend.md makes up are used there only."""
    for group, choice in re.findall(r"`([a-z_]+)=([\w-]+)`", page.read_text("utf-8")):
        if (ROOT / "conf" / group).is_dir() and page.name != "extend.md":
            assert (ROOT / "conf" / group / f"{choice}.yaml").is_file(), f"{group}={choice}"


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) > 30
    assert any("\\" not in command and "hydra/sweeper=search" in command for command in COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", text):
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text("utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, f"{target}{anchor}"
    for path in re.findall(r"(?:`|python )((?:src|conf|scripts|tests|docs)/[\w./*-]*)", text):
        assert any(ROOT.glob(path.rstrip("/"))) or page.name == "extend.md", path


def test_the_readme_is_a_page_or_two() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_train_evaluate_and_generate(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The commands of docs/train.md in a short form; the whole way, with a sweep, is the slow test below."""
    text = tmp_path / "my.txt"
    text.write_text((ROOT / "src" / "language_model" / "sonnets.txt").read_text("utf-8"), "utf-8")
    run = train("data=text", f"data.path={text}")
    assert run.result["status"] == "finished"
    said = ""
    for name, *arguments in (("evaluate",), ("generate", "prompt=Shall I", "max_new_tokens=5", "temperature=0.8")):
        monkeypatch.setattr(sys, "argv", [name, f"run={run.folder}", "accelerator=cpu", *arguments])
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        said += capsys.readouterr().out
    assert "perplexity" in said
    assert "Shall I" in said


@pytest.mark.slow
def test_the_readmes_way_from_a_run_to_text(script: Script, tmp_path: Path) -> None:
    """Train, train longer, evaluate, generate, sweep and compare, as the README types them, in a short form."""
    text = tmp_path / "my.txt"
    text.write_text((ROOT / "src" / "language_model" / "sonnets.txt").read_text("utf-8"), "utf-8")
    run, sweep = f"folder={tmp_path / 'run'}", f"hydra.sweep.dir={tmp_path / 'rates'}"
    for name, arguments in (
        ("train.py", ["data=text", "data.path=my.txt", run, *TINY]),
        ("train.py", ["resume=run", "trainer.max_epochs=3"]),
        ("evaluate.py", ["run=run"]),
        ("generate.py", ["run=run", "prompt=Shall I", "max_new_tokens=20"]),
        ("train.py", ["-m", "optimizer.lr=1e-3,3e-3", "seed=1,2,3", sweep, *TINY]),
        ("compare.py", ["sweep=rates", "by=optimizer.lr"]),
    ):
        done = script(name, *arguments)
        assert done.returncode == 0, done.stderr
