"""From YAML and arguments to a dataclass: what is merged, what is refused and in which words, what is written back."""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.config.load import load_config
from torchft.config.problems import is_secret
from torchft.config.show import config_dict, config_yaml, save_config
from torchft.errors import ConfigError, Problem

TOKEN = "hf_" + "aB3dE6gH9j" * 3


@dataclass
class Source:
    path: str  # a file of samples
    weight: float = 1.0  # its share

    def check(self) -> Iterator[Problem]:
        if self.weight < 0:
            yield Problem("data.train", f"weight {self.weight}", "0 or more", "raise it")


@dataclass
class Data:
    """What is read."""

    train: list[Source]  # training files
    validation: dict[str, Source] = field(default_factory=dict)  # validation files by name
    masks: Literal["on", "off"] = "on"  # mask other documents
    seq_len: int = 128  # tokens a row


@dataclass
class Optim:
    lr: float = 1e-4  # learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # averages
    max_norm: Optional[float] = 1.0  # noqa: UP045 (both spellings are supported)
    fused: bool = True  # one kernel

    def check(self) -> Iterator[Problem]:
        if self.lr <= 0:
            yield Problem("optim.lr", str(self.lr), "above 0", "give e.g. 1e-5")


@dataclass
class Adapter:
    rank: int  # inner size
    targets: list[str] = field(default_factory=lambda: ["q_proj"])  # globs


@dataclass
class Config:
    data: Data
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4))
    adapter: Adapter | None = None  # null: train everything
    seed: int = 0  # seed of all noise
    run_name: str = "run"  # name shown
    free: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Source] = field(default_factory=lambda: {"x": Source("x", 2.0)})  # more files
    plugins: list[str] = field(default_factory=list)  # own modules


def load(*argv: str) -> Config:
    return load_config(Config, list(argv), description="A test.")


def problems(*argv: str) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    assert caught.value.problems, "no structured problem"
    return {p.key: p for p in caught.value.problems}


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


TRAIN = "data.train=[{path: a.jsonl}]"


def test_defaults_and_required_values():
    """A field without default must be given, deep inside a section too; a default instance keeps its own values under an override."""
    missing = problems()
    assert set(missing) == {"data.train"} and missing["data.train"].where == "command line"
    assert load(TRAIN) == Config(data=Data(train=[Source("a.jsonl")]))
    assert load(TRAIN, "optim.fused=false").optim == Optim(lr=3e-4, fused=False)
    assert set(problems(TRAIN, "adapter.targets=[a]")) == {"adapter.rank"}
    assert set(problems("data.train=[{weight: 2}]")) == {"data.train.0.path"}
    assert set(problems(TRAIN, "seed=???")) == {"seed"}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("3", 3.0), ("2.5e+3", 2500.0), ("'1e-5'", 1e-5), (".5", 0.5)],
)
def test_numbers_without_a_point_are_numbers(tmp_path, argument, expected):
    """1e-5 is a float in YAML files and arguments, as it is in Python."""
    from_argument = load(TRAIN, f"optim.lr={argument}").optim.lr
    from_file = load(TRAIN, "--config", write(tmp_path / "a.yaml", f"optim:\n  lr: {argument}\n")).optim.lr
    assert (type(from_argument), from_argument, from_file) == (float, expected, expected)


@pytest.mark.parametrize("text", ["007", "on", "1e-5", "1_000", "a=b", "x: y", "2024-01-01", "~user", "0x1f", "a #b", "'quoted'"])
def test_texts_are_kept_as_typed(text, tmp_path):
    """A text field gets the characters that were typed, not YAML's idea of them; quotes are YAML's."""
    assert load(TRAIN, f"run_name={text}").run_name == text.strip("'")
    if text not in ("x: y", "a #b"):
        assert load(TRAIN, "--config", write(tmp_path / "a.yaml", f"run_name: {text}\n")).run_name == text.strip("'")


def test_literals_named_like_yaml_booleans():
    """masks: off is the choice "off", not false."""
    assert load(TRAIN, "data.masks=off").data.masks == "off"


def test_null_and_optional_sections():
    """null switches an optional value or section off; setting one key of it switches it on."""
    assert load(TRAIN, "optim.max_norm=null").optim.max_norm is None
    assert load(TRAIN, "adapter.rank=8").adapter == Adapter(8)
    assert load(TRAIN, "adapter={rank: 8}", "adapter.targets=['*']").adapter == Adapter(8, ["*"])
    assert load(TRAIN, "adapter.rank=8", "adapter=null").adapter is None
    assert set(problems(TRAIN, "seed=null", "run_name=null")) == {"seed", "run_name"}


def test_lists_are_replaced_mappings_are_merged_and_items_can_be_set():
    """Later wins: lists as a whole, mappings key by key; name.0.key and name[0].key reach into a list."""
    cfg = load("data.train=[{path: a}, {path: b}]", "data.train.1.weight=3", "data.train[0].path=c", "data.validation.x.path=v")
    assert cfg.data.train == [Source("c"), Source("b", 3.0)] and cfg.data.validation == {"x": Source("v")}
    cfg = load("data.train=[{path: a}, {path: b}]", "data.train=[{path: z}]", "data.validation={x: {path: v}}", "data.validation.y.path=w")
    assert cfg.data.train == [Source("z")] and list(cfg.data.validation) == ["x", "y"]
    assert problems(TRAIN, "data.train.1.path=b")["data.train.1.path"].where == "command line"
    assert load(TRAIN, "extra.x.path=z", "extra.y.path=y").extra == {"x": Source("z", 2.0), "y": Source("y")}
    assert load(TRAIN, "optim.betas=[0.8, 0.9]").optim.betas == (0.8, 0.9)
    assert load(TRAIN, "free.a.b=[1, x]").free == {"a": {"b": [1, "x"]}}


def test_includes_later_wins_relative_to_the_including_file(tmp_path, monkeypatch):
    """Included files first, in order, then the file, then arguments; paths are relative to the file that names them; a diamond is fine."""
    write(tmp_path / "parts/base.yaml", "seed: 1\nrun_name: base\noptim: {lr: 1e-5, fused: false}\n")
    write(tmp_path / "parts/one.yaml", "include: [base.yaml]\nseed: 2\noptim: {lr: 2e-5}\n")
    write(tmp_path / "parts/two.yaml", "include: [base.yaml]\nrun_name: two\n")
    main = write(
        tmp_path / "runs/main.yaml", "include: [../parts/one.yaml, ../parts/two.yaml]\noptim: {lr: 3e-5}\ndata: {train: [{path: a}]}\n"
    )
    monkeypatch.chdir(tmp_path)
    cfg = load("--config", main)
    assert (cfg.seed, cfg.run_name, cfg.optim) == (1, "two", Optim(lr=3e-5, fused=False))
    assert load(f"--config={main}", "seed=5").seed == 5
    assert "include" not in config_dict(cfg)


def test_include_cycle_and_missing_include(tmp_path):
    """A file that includes itself through another is named with its chain; a missing include with its path."""
    main = write(tmp_path / "a.yaml", "include: [b.yaml]\n")
    write(tmp_path / "b.yaml", "include: [a.yaml]\n")
    found = problems("--config", main)["include"]
    assert "a.yaml -> " in found.given and found.where.endswith("b.yaml:1")
    write(tmp_path / "b.yaml", "include: [nothing.yaml]\n")
    assert "nothing.yaml" in problems("--config", main)["include"].given
    write(tmp_path / "b.yaml", "include: {a: 1}\n")
    assert problems("--config", main)["include"].fix == "write include: [base.yaml]"
    assert "--config" in problems(TRAIN, "include=[a.yaml]")["include"].fix


def test_all_problems_at_once_with_file_and_line(tmp_path, monkeypatch):
    """Unknown keys, wrong types, bad choices, missing values and the sections' own checks come in one error, each where it was given."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.yaml", "\noptim:\n  lr: -1\n  fussed: true\n")
    write(
        tmp_path / "my.yaml",
        "include: [base.yaml]\ndata:\n  masks: offf\n  train:\n  - path: a\n    weigth: 2\n  - weight: many\nseed: 1.5\n",
    )
    found = problems("--config", "my.yaml", "optim.betas=[1]", "adaptor.rank=3", "lr=3", "adapter=3")
    wheres = {key: p.where for key, p in found.items()}
    assert wheres == {
        "optim.lr": "base.yaml:3",
        "optim.fussed": "base.yaml:4",
        "data.masks": "my.yaml:3",
        "data.train.0.weigth": "my.yaml:6",
        "data.train.1.weight": "my.yaml:7",
        "data.train.1.path": "my.yaml:7",
        "seed": "my.yaml:8",
        "optim.betas": "command line",
        "adaptor": "command line",
        "lr": "command line",
        "adapter": "command line",
    }
    assert found["optim.fussed"].fix == "did you mean optim.fused?"
    assert found["data.train.0.weigth"].fix == "did you mean data.train.0.weight?"
    assert found["lr"].fix == "did you mean optim.lr?"
    assert found["adaptor"].fix == "did you mean adapter?"
    assert found["data.masks"].expected == "one of on, off" and found["data.masks"].fix == "did you mean off?"
    assert found["data.train.1.weight"].expected == "a number" and "many" in found["data.train.1.weight"].given
    assert found["adapter"].expected == "a mapping with the keys of Adapter or null"


def test_checks_of_list_items_and_defaults_are_run():
    """A dataclass inside a list checks itself; a bad default says that it is one."""
    assert problems("data.train=[{path: a, weight: -1}]")["data.train"].where == "command line"

    @dataclass
    class Bad:
        optim: Optim = field(default_factory=lambda: Optim(lr=-1.0))

    with pytest.raises(ConfigError) as caught:
        load_config(Bad, [], description="")
    assert [(p.key, p.where) for p in caught.value.problems] == [("optim.lr", "default value")]


@pytest.mark.parametrize(
    ("argument", "key", "fix"),
    [
        ("seed=1e3", "seed", "write 1000"),
        ("seed=true", "seed", "give an integer"),
        ("optim.fused=maybe", "optim.fused", "give true or false"),
        ("run_name=[a, b", "run_name", """quote a text for YAML: run_name='"[a, b"'"""),
        ("optim.lrr=3", "optim.lrr", "did you mean optim.lr?"),
        ("nonsense=3", "nonsense", "see --help for all keys"),
    ],
)
def test_wrong_arguments(argument, key, fix):
    """The fix of each is a thing to type."""
    assert problems(TRAIN, argument)[key].fix == fix


@pytest.mark.parametrize(
    ("argv", "key", "fix"),
    [
        (["--lr", "3"], "--lr", "write optim.lr=3"),
        (["--lr=3"], "--lr", "write optim.lr=3"),
        (["--max-norm", "-1"], "--max-norm", "write optim.max_norm=-1"),
        (["seed"], "seed", "write seed=..."),
        (["=3"], "", "write key=..."),
        (["--config"], "--config", "write --config FILE.yaml"),
    ],
)
def test_arguments_of_another_form(argv, key, fix):
    """`--lr 3` is answered with the line to write; it doesn't hide other problems."""
    found = problems(*argv[:1], *argv[1:], "optim.fused=7x") if argv != ["--config"] else problems(*argv)
    assert found[key].fix.startswith(fix.removesuffix("..."))
    assert argv == ["--config"] or "optim.fused" in found


@pytest.mark.parametrize(
    ("text", "given", "place"),
    [
        ("", "an empty file", ""),
        ("# nothing\n", "an empty file", ""),
        ("- a\n- b\n", "a sequence at the top", ""),
        ("seed 3\n", "a scalar at the top", ""),
        ("seed: 1\noptim: [1,\n", "", ":3:1"),
        ("seed: 1\n\tb: 2\n", "", ":2:1"),
        ("seed: 1\nseed: 2\n", "duplicate key", ":2:1"),
        ("optim:\n  lr: 1\n  lr: 2\n", "duplicate key", ":3:3"),
        ("seed: *nothing\n", "undefined alias", ":1:7"),
        ("seed: !!python/object/apply:os.getcwd []\n", "python", ":1:7"),
        ("seed: " + "[" * 100 + "]" * 100, "nesting deeper", ""),
        ("{" * 50_000, "nesting deeper", ""),
        ("a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
         "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: [*d, *d, *d, *d, *d, *d, *d, *d]\n", "expan", ""),
        ("a: &a [*a]\n", "recursive", ""),
    ],
)  # fmt: skip
def test_broken_and_hostile_files(tmp_path, monkeypatch, text, given, place):
    """Each is an error with file, line and column, before anything is constructed."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.yaml", text)
    found = problems("--config", "a.yaml")["--config"]
    assert given.lower() in found.given.lower()
    assert found.where.startswith("a.yaml") and found.where.endswith(place)


def test_unreadable_files(tmp_path):
    """Missing, a folder, not UTF-8, too large: an error that names the file."""
    assert "nothing.yaml" in problems("--config", "nothing.yaml")["--config"].given
    assert str(tmp_path) in problems("--config", str(tmp_path))["--config"].given
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    assert "UTF-8" in problems("--config", str(tmp_path / "latin.yaml"))["--config"].expected
    assert "1048576 bytes" in problems("--config", write(tmp_path / "large.yaml", "a: " + "x" * (1 << 20)))["--config"].expected


def test_two_configs_are_refused(tmp_path):
    """A second --config would silently win: one includes the other instead."""
    config = write(tmp_path / "a.yaml", "data: {train: [{path: a}]}\n")
    assert "include" in problems("--config", config, "--config", config)["--config"].fix


def test_keys_that_are_numbers(tmp_path):
    """`1:` is the name "1", known or not."""
    assert load(TRAIN, "data.validation={1: {path: v}}").data.validation == {"1": Source("v")}
    found = problems(TRAIN, "--config", write(tmp_path / "a.yaml", "optim:\n  1: 2\n3: 4\n"))
    assert set(found) == {"optim.1", "3"}


def test_dotted_keys_in_files_are_answered(tmp_path):
    """`optim.lr: 3` in a YAML file is told to nest."""
    found = problems(TRAIN, "--config", write(tmp_path / "a.yaml", "optim.lr: 3\n"))
    assert found["optim.lr"].fix == "in a YAML file write it nested: optim: {lr: ...}"


@pytest.mark.parametrize("key", ["_target_", "_component_", "optim._target_", "free.a._component_", "data.train.0._target_"])
def test_keys_that_name_code_are_refused(key):
    """A config never names a Python object to call, free mappings included."""
    assert "plugins" in problems(TRAIN, f"{key}=os.system")[key].fix


def test_plugins_by_name_and_by_path(tmp_path, monkeypatch):
    """A plugin runs before the checks; a .py path is relative to the YAML file that names it and saved absolute."""
    write(tmp_path / "runs/mine.py", "LOADED = True\n")
    write(tmp_path / "modules/my_plugin_module.py", "LOADED = True\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    config = write(tmp_path / "runs/a.yaml", "plugins: [mine.py, my_plugin_module]\n")
    cfg = load(TRAIN, "--config", config)
    assert cfg.plugins == [str(tmp_path / "runs/mine.py"), "my_plugin_module"]
    assert sys.modules["torchft_plugin_mine"].LOADED and sys.modules["my_plugin_module"].LOADED


def test_plugins_that_fail_are_named(tmp_path):
    """A missing or raising plugin is an error with its reason, and leaves no half-imported module behind."""
    assert "ModuleNotFoundError" in problems(TRAIN, "plugins=[no_such_module]")["plugins"].fix
    broken = write(tmp_path / "broken.py", "raise ValueError('planted')\n")
    assert "ValueError: planted" in problems(TRAIN, f"plugins=[{broken}]")["plugins"].fix
    assert "torchft_plugin_broken" not in sys.modules
    assert problems(TRAIN, "plugins=mine")["plugins"].fix == "write plugins: [my_module]"


def test_references_resolve_and_stay_references_when_written(tmp_path, monkeypatch):
    """${key} and ${oc.env:NAME} give their values; what is written down keeps the reference, so that no secret reaches a file."""
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    monkeypatch.setenv("SOME_NUMBER", "12")
    cfg = load(TRAIN, "run_name=${oc.env:SOME_TOKEN}", "seed=${oc.env:SOME_NUMBER}", "data.seq_len=${seed}", "free.a=${oc.env:SOME_TOKEN}")
    assert (cfg.run_name, cfg.seed, cfg.data.seq_len, cfg.free) == (TOKEN, 12, 12, {"a": TOKEN})
    save_config(cfg, tmp_path / "config.yaml")
    for text in ((tmp_path / "config.yaml").read_text(), str(config_dict(cfg))):
        assert TOKEN not in text and "${oc.env:SOME_TOKEN}" in text
    assert load("--config", str(tmp_path / "config.yaml")) == cfg


def test_a_text_that_looks_like_a_reference_is_written_as_text(tmp_path):
    """A text with ${...} that was set in code, not by the user as a reference, loads back as that text."""
    cfg = dataclasses.replace(load(TRAIN), run_name="costs ${seed}")
    save_config(cfg, tmp_path / "config.yaml")
    assert load("--config", str(tmp_path / "config.yaml")) == cfg


def test_references_that_lead_nowhere(monkeypatch):
    """A missing variable, a missing key and a value of another type are problems; a secret in it is not printed."""
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    found = problems(TRAIN, "seed=${oc.env:NOT_SET}", "run_name=${nothing}", "optim.lr=${oc.env:SOME_TOKEN}")
    assert set(found) == {"seed", "run_name", "optim.lr"}
    assert "NOT_SET" in found["seed"].fix and TOKEN not in str(found)


@pytest.mark.parametrize(
    "argument",
    [f"run_name={TOKEN}", f"run_name={TOKEN}${{seed}}", "free.api_key=abcdef${seed}",
     f"free.a={TOKEN}", "free.api_key=x", f"hub.token={TOKEN}", "free.hf_token=x",
     "free.password=[x", "free.wandb_api_key=1x",
     "free.url=https://me:pass1234@host/x", "free.key=sk-proj-" + "a1B2" * 6],
)  # fmt: skip
def test_secrets_are_refused_and_never_printed(argument):
    """A secret as a value is refused with the advice to use the environment, and the message doesn't repeat it."""
    with pytest.raises(ConfigError) as caught:
        load(TRAIN, argument)
    text, secret = str(caught.value), argument.partition("=")[2]
    assert "oc.env" in text
    assert len(secret) < 5 or secret not in text
    assert "pass1234" not in text
    with pytest.raises(ConfigError) as caught:
        load("--token", TOKEN, f"--hf-token={TOKEN}")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("name", ["max_tokens", "tokenizer", "eos_token", "num_tokens", "pad_token", "secretary", "path"])
def test_ordinary_keys_are_no_secrets(name):
    """Words that only contain "token" are ordinary, and so are names that begin like a token."""
    for value in ("<|im_end|>", "hf_checkpoint", "models/hf_llama_135m_instruct", "task-sk-learn", "https://host:80/a@b"):
        assert not is_secret(name, value)


def test_secrets_set_in_code_are_redacted_when_written():
    """A config changed in code after loading doesn't leak either."""
    cfg = dataclasses.replace(load(TRAIN), run_name=TOKEN, free={"password": "x", "list": [TOKEN]})
    for text in (config_yaml(cfg), str(config_dict(cfg))):
        assert TOKEN not in text and text.count("<redacted>") == 3


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="\x85\u2028\u2029\ufeff"), max_size=12)


@given(
    run_name=texts,
    lr=st.floats(1e-12, 1e12),
    seed=st.integers(-(2**62), 2**62),
    names=st.dictionaries(st.sampled_from(["a", "b.c", "on", "1"]), texts, max_size=3),
    free=st.dictionaries(
        st.sampled_from(["a", "b"]), st.none() | st.booleans() | st.floats(allow_nan=False) | texts | st.lists(texts, max_size=2)
    ),
)
def test_saved_config_loads_back_equal(tmp_path_factory, run_name, lr, seed, names, free):
    """Whatever the values, the written YAML holds the whole config and loads to an equal one."""
    data = Data(train=[Source("a")], validation={name: Source(text) for name, text in names.items()})
    cfg = Config(data=data, optim=Optim(lr=lr), run_name=run_name, seed=seed, free=free, adapter=Adapter(3))
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(cfg, path)
    assert load("--config", str(path)) == cfg


def test_print_config_prints_everything_and_exits_0(capsys, tmp_path):
    """--print-config writes the whole config, defaults included, as YAML that loads back; problems come first."""
    with pytest.raises(SystemExit) as exit_:
        load(TRAIN, "optim.lr=1e-5", "--print-config")
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "max_norm: 1.0" in text
    assert load("--config", write(tmp_path / "a.yaml", text)) == load(TRAIN, "optim.lr=1e-5")
    assert "optim.lr" in problems(TRAIN, "optim.lr=x", "--print-config")


def test_help_lists_every_key_with_type_default_and_comment(capsys):
    """--help shows each key as it is typed, list items and named entries included; grouped by section."""
    with pytest.raises(SystemExit) as exit_:
        load("--help")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert exit_.value.code == 0 and lines[0] == "A test."
    for line in [
        "general",
        "seed: int = 0 # seed of all noise",
        "data",
        "data.train: list[Source] = required # training files",
        "data.train[].path: str = required # a file of samples",
        "data.validation.<name>.weight: float = 1.0 # its share",
        "data.masks: on|off = 'on' # mask other documents",
        "optim.lr: float = 0.0003 # learning rate",
        "optim.betas: tuple[float, float] = [0.9, 0.95] # averages",
        "optim.max_norm: float|null = 1.0 # noqa: UP045 (both spellings are supported)",
        "adapter: Adapter|null = null # null: train everything",
        "adapter.rank: int = required # inner size",
    ]:
        assert line in lines, line
    assert lines.index("general") < lines.index("data") < lines.index("optim")
