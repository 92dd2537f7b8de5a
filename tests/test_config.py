import sys
from typing import Literal

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveInt

from language_model.runs.command_line import ONE_LINE, entry_point, quote_override
from language_model.runs.config import ROOT, ConfigError, as_dict, build, check_config, flatten, name_or_timestamp

CONF = ROOT / "conf"
GROUPS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))
NEEDED = {
    "tokenizer=file": "tokenizer.path=tokenizer.json",
    "data=text": "data.path=my.txt",
    "data=bin": "data.train_path=train.bin",
    "experiment=gpt2_124m": "data.train_path=train.bin",
}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


@pytest.mark.parametrize("choice", GROUPS)
def test_every_file_in_conf_fits_what_it_builds(choice: str) -> None:
    check_config(composed(choice, *([NEEDED[choice]] if choice in NEEDED else [])))


def test_the_defaults_are_the_chapters_section_8() -> None:
    config = composed()
    chapter = {
        "model.d_model": 64, "model.n_heads": 4, "model.n_layers": 4, "model.d_ff": 256, "model.max_seq_len": 64,
        "model.dropout": 0.1, "data.batch_size": 32, "data.seq_len": 64, "data.stride": 1, "trainer.max_epochs": 50,
        "optimizer.lr": 3e-4, "optimizer.betas": [0.9, 0.999], "optimizer.weight_decay": 0.01,
        "schedule.min_lr": 1e-5, "schedule.warmup_steps": 50, "trainer.gradient_clip_val": 1.0,
        "callbacks.console.log_interval": 5, "callbacks.every.every_n_epochs": 25,
    }  # fmt: skip
    values = flatten(as_dict(config))
    assert {key: values[key] for key in chapter} == chapter
    assert values["optimizer._target_"] == "language_model.training.optimizer.adamw"
    assert values["trainer.accelerator"] == "auto"


def test_every_parameter_that_can_be_set_is_listed() -> None:
    """No guessing of +keys: what the package's own parts take stands in the config."""
    import inspect

    import hydra

    for key, node in as_dict(composed()).items():
        nodes = (
            [node]
            if isinstance(node, dict) and "_target_" in node
            else list(node.values())
            if isinstance(node, dict)
            else []
        )
        for part in nodes:
            if not part["_target_"].startswith("language_model."):
                continue
            target = hydra.utils.get_object(part["_target_"])
            own = target.__dict__.get("__init__", object) if inspect.isclass(target) else target
            if own is object:
                continue  # Lightning's parameters
            taken = set(inspect.signature(target).parameters)
            assert taken - set(part) <= {"named_parameters", "step", "texts", "end_of_text"}, key


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optimizer.lr=abc"], "optimizer.lr=abc: input should be a valid number"),
        (["optimizer.lr=-1"], "optimizer.lr=-1: input should be greater than 0"),
        (["optimizer.lr=0"], "optimizer.lr=0: input should be greater than 0"),
        (["optimizer.betas=[0.9,1.0]"], "optimizer.betas=[0.9, 1.0]: item 1: input should be less than 1"),
        (["model.d_model=64.5"], "model.d_model=64.5: input should be a valid integer"),
        (["model.d_model=true"], "model.d_model=true: input should be a valid integer"),
        (["model.dropout=1"], "model.dropout=1: input should be less than 1"),
        (["model.norm=layer"], "model.norm=layer: input should be 'layernorm' or 'rmsnorm'"),
        (["data.batch_size=0"], "data.batch_size=0: input should be greater than 0"),
        (["trainer.max_epochs=many"], "trainer.max_epochs=many: allowed: 1 and up; -1 for no limit"),
        (["seed=-1"], "seed=-1: input should be greater than or equal to 0"),
        (["seed=4294967296"], "seed=4294967296: input should be less than 4294967296"),
        (["name=a/b"], "name=a/b: string should match pattern"),
        (["name=.."], "name=..: string should match pattern"),
        (["+nonsense=1"], "nonsense: unknown key; known: "),
        (["+model.nheads=1"], "model.nheads: unknown key; did you mean n_heads"),
        (["+callbacks.x.y=1"], "callbacks.x.y: nothing takes this key"),
        (["data=text"], "data.path: a value is needed, as data.path=..."),
        (
            ["optimizer._target_=torch.optim.Nix"],
            "optimizer._target_=torch.optim.Nix: module 'torch.optim' has no attribute 'Nix'",
        ),
        (["model.d_ff=${nothing}"], "Interpolation key 'nothing' not found"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(composed(*overrides))
    assert str(error.value).startswith(says) or says in str(error.value).split("; or")[0]
    assert "\n" not in str(error.value)


class Part:
    """What a user may add: no schema but its annotations."""

    def __init__(self, size: PositiveInt, kind: Literal["a", "b"] = "a", anything=None) -> None:
        if size == 13:
            raise RuntimeError("no\nluck")
        if size == 14:
            open("/does/not/exist")
        self.size = size
        self.kind = kind


def node(**keys: object) -> DictConfig:
    return OmegaConf.create({"part": {"_target_": f"{__name__}.Part", **keys}})


def test_a_class_of_the_users_is_built_and_checked_by_its_annotations() -> None:
    part = build(node(size=3, kind="b"), "part")
    assert (part.size, part.kind) == (3, "b")
    assert build(node(kind="b"), "part", size=4).size == 4
    check_config(node(size=None))  # may be worked out later


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"size": None}, "part.size=null: input should be a valid integer"),
        ({"size": 0}, "part.size=0: input should be greater than 0"),
        ({"size": 1, "kind": "c"}, "part.kind=c: input should be 'a' or 'b'"),
        ({"size": 1, "kin": "a"}, "part.kin: unknown key; did you mean kind?"),
        ({"size": 13}, "part: RuntimeError: no luck (HYDRA_FULL_ERROR=1 shows where)"),
        ({"size": 14}, "part: /does/not/exist: no such file or directory"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(keys: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(node(**keys), "part")
    assert str(error.value) == says


def test_names() -> None:
    assert name_or_timestamp("mine") == "mine"
    assert name_or_timestamp(7) == "7"
    assert len({name_or_timestamp(None) for _ in range(50)}) == 50


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("model=smal", "model=smal: there is no such file in conf/model; choose from baby, gpt2, "),
        ("modle=nano", "modle: unknown key; did you mean model?"),
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean lr?"),
        ("lr=1", "lr: unknown key; did you mean optimizer.lr or schedule.lr?"),
        ("optimizer.zzz=1", "optimizer.zzz: unknown key; known: lr, betas, "),
        ("optimizer=sgd optimizer.momentun=1", "optimizer.momentun: unknown key; did you mean momentum"),
        ("model=[nano", "model=[nano: there is no such file in conf/model; choose from baby, gpt2, "),
        ("model=null", "model=null: a file of conf/model is needed; choose from baby, gpt2, "),
        ("learning_rate=1", "learning_rate: unknown key; here it is optimizer.lr"),
        ("model.n_embd=64", "model.n_embd: unknown key; here it is model.d_model"),
        ("ckpt_path=x", "ckpt_path: unknown key; here it is resume, a run or a checkpoint file"),
        ("train=False", "train: unknown key; here it is scripts/train.py to train, scripts/evaluate.py"),
        ("trainer=ddp", "trainer=ddp: there is no such file in conf/trainer; here it is trainer.devices=2"),
        (
            "logger=wandb",
            "logger=wandb: there is no such file in conf/logger; here it is a file conf/logger/wandb.yaml",
        ),
        ("--batch_size=32", "--batch_size=32: settings are written without dashes, as data.batch_size=..."),
        ("--config-name=x", "--config-name=x: there is no conf/x.yaml"),
        ("callbacks.x._target_=y", "callbacks.x._target_: there is no such node yet; a + in front adds it"),
        ("trainer.max_epochs 3", "trainer.max_epochs: settings are written key=value, with quotes around"),
        ("seed=1 -m seed=x{", "seed=x{: "),
    ],
)
def test_an_override_that_hydra_refuses_is_told_in_one_line(
    argument: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *argument.split()])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as stopped:
        entry_point("train")(lambda config: pytest.fail("it ran"))()
    assert str(stopped.value).startswith(f"error: {says}")
    assert "\n" not in str(stopped.value)


def test_scripts_for_trained_runs_know_their_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "ckpt_path=x"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit, match=r"^error: ckpt_path: unknown key; here it is checkpoint$"):
        entry_point("evaluate")(lambda config: pytest.fail("it ran"))()


def test_only_the_first_process_says_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that Lightning starts inherit HYDRA_FULL_ERROR, which this one has set for Hydra."""

    def task(config: DictConfig) -> None:
        raise ConfigError("seed=1: not today")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv(ONE_LINE, "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        entry_point("train")(task)()
    assert stopped.value.code == 1


def test_a_config_error_ends_a_script_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def task(config: DictConfig) -> None:
        raise ConfigError("seed=1: not today")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit, match=r"^error: seed=1: not today$"):
        entry_point("train")(task)()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError):
        entry_point("train")(task)()


@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_text_can_be_a_value(text: str) -> None:
    argument = quote_override(f"prompt={text}", literal=("prompt",))
    if not (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""):
        assert OverridesParser.create().parse_override(argument).value() == text


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("data.path=Всё.txt", "Всё.txt"),
        ("data.path=[Всё.txt", "[Всё.txt"),
        ("data.path='a b'", "a b"),
        ("data.path=[a.txt,b.txt]", ["a.txt", "b.txt"]),
        ("optimizer.lr=1e-3", 1e-3),
        ("name=null", None),
    ],
)
def test_other_values_are_hydras_where_it_can_read_them(argument: str, value: object) -> None:
    assert OverridesParser.create().parse_override(quote_override(argument)).value() == value
    assert quote_override("-m") == "-m"
    assert quote_override("--cfg=job") == "--cfg=job"
    assert quote_override("lr=1,2") == "lr=1,2"  # a sweep
