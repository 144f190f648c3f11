"""`torchft validate` and the check before `torchft run`: all problems at once, nothing started, nothing written."""

import json
from pathlib import Path

import pytest

from tests.helpers.models import make_model
from tests.helpers.recipe import ROOT, arguments
from torchft.cli.main import main
from torchft.data.sources import SourceConfig, first_records, open_records
from torchft.train.recipes import load_recipe
from torchft.train.validate import validate

FULL = ROOT / "recipes" / "full_finetune.py"


@pytest.fixture
def argv(tmp_path) -> list[str]:
    return arguments(tmp_path / "run", tmp_path / "cache")


def problems(argv: list[str], num_processes: int = 1) -> list[str]:
    return validate(load_recipe(FULL), argv, num_processes)


def keys(found: list[str]) -> set[str]:
    return {text.split()[0].split("\n")[0] for text in found}


def test_a_good_config_has_none_and_nothing_is_written(argv, tmp_path):
    """The debug config on 1, 2 and 4 processes; no run folder, no token cache."""
    assert [problems(argv, n) for n in (1, 2, 4)] == [[], [], []]
    assert list(tmp_path.iterdir()) == []


def test_every_part_is_told_at_once(argv, tmp_path):
    """Lengths, batches, schedule, a rule of the optimizer, the output folder, data files and their records: one problem each."""
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"mesages": []}\n{not json\n')
    (tmp_path / "file").write_text("")
    more = ["data.seq_len=999999", "schedule.warmup_steps=99", "train.global_batch_size=7"]
    more += [f"data.train.0.path={tmp_path}/bad.jsonl", "data.validation.heldout.path=none.jsonl", f"output_dir={tmp_path}/file/x"]
    more += ["optim.groups=[{pattern: 'nothing.*'}]"]
    found = problems([*argv, *more], 3)
    text = "\n".join(found)
    for part in (
        "data.seq_len",
        "schedule.warmup_steps",
        "train.global_batch_size",
        "output_dir",
        "optim.groups.0",
        "none.jsonl: no such file",
    ):
        assert part in text, part
    assert "bad.jsonl:2" in text and "did you mean 'messages'" in text and "bad.jsonl:3" in text


@pytest.mark.parametrize(
    "setting, num_processes, key",
    [
        ("model.path=nowhere", 1, "model.path"),
        ("model.init=weights", 1, "holds no weights"),
        ("parallel.tp=3", 3, "parallel.tp"),
        ("parallel.dp_shard=2", 3, "parallel"),
        ("tokenizer.template=nonesuch", 1, "tokenizer.template"),
        ("optim.lrr=3", 1, "optim.lrr"),
        ("checkpoint.load=nowhere", 1, "checkpoint.load"),
        ("data.seq_len=16", 1, "data.seq_len"),
        ("seed=0", 0, "--nproc"),
    ],
)
def test_each_problem_by_itself(argv, setting, num_processes, key):
    """What a start would stop at is told, by the key or the words that a start would use."""
    found = problems([*argv, setting], num_processes)
    assert found and any(key in text for text in found), found


def test_the_config_of_another_machine(argv):
    """FlexAttention is refused on this CPU and accepted for the CUDA device that the config names; so is variable-length attention, but
    not for sampling, which needs a cache."""
    assert keys(problems([*argv, "model.attention=flex", "device=cpu"])) == {"model.attention"}
    spec = ["model.path=null", "model.family=llama", "model.spec={hidden_size: 64, intermediate_size: 96, num_layers: 2, num_heads: 4}"]
    assert "model.attention" not in keys(problems([*argv, *spec, "model.attention=flex", "device=cuda"]))
    varlen = [*argv, *spec, "model.attention=varlen", "device=cuda", "precision.compute=bf16"]
    assert not {"model.attention", "validate.prompts"} & keys(problems(varlen))
    assert "validate.prompts" in keys(problems([*varlen, "validate.prompts=[Hi]"]))


def test_a_tokenizer_of_another_model(argv, tmp_path):
    """A tokenizer with more ids than the model's vocabulary, which would only fail at some later token."""
    folder = make_model(tmp_path / "big")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert "tokenizer.path" in keys(problems([*argv, f"model.path={folder}"]))


def test_first_records_are_those_of_open_records(tmp_path):
    """Lines and arrays, byte order mark and blank lines: the same records and places as the whole reading; a late bad line is not read."""
    rows = [{"messages": [{"role": "user", "content": f"é{i}"}]} for i in range(5)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + "\n\n".join(map(json.dumps, rows)).encode() + b"\n")
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    for name in ("a.jsonl", "b.json"):
        cfg = SourceConfig(str(tmp_path / name))
        records = open_records(cfg)
        assert list(first_records(cfg, 3)) == [(record, where) for _, record, where in records.read(0, 3)]
    both = SourceConfig(str(tmp_path))
    assert len(list(first_records(both, 2))) == 4
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]) + "\nbroken\n")
    assert len(list(first_records(SourceConfig(str(tmp_path / "a.jsonl")), 1))) == 1


def test_generation_recipe(tmp_path):
    """The other recipe's config: model, prompts and the number of processes."""
    recipe = load_recipe(ROOT / "recipes" / "generate.py")
    model = make_model(tmp_path / "hf")
    (tmp_path / "p.txt").write_text("Hi\n")
    good = [f"model.path={model}", f"prompts.path={tmp_path}/p.txt", f"output={tmp_path}/o.jsonl"]
    assert validate(recipe, good) == []
    text = "\n".join(validate(recipe, [*good, "model.path=nowhere", "prompts.path=none.txt"], 2))
    assert all(word in text for word in ("--nproc", "model.path", "none.txt"))


def test_the_verb(capsys, tmp_path):
    """Exit 0 and a last line that says so; 2 with the problems; of a run folder its own config is taken."""
    assert main(["validate", "debug/tiny", "--nproc", "2", f"model.path={ROOT}/configs/debug/tiny-llama", *_data()]) == 0
    assert capsys.readouterr().out == "debug/tiny with recipe full_finetune on 2 process(es): no problem found\n"
    assert main(["validate", "debug/tiny", "--nproc", "3", *_data()]) == 2
    out = capsys.readouterr().out
    assert "train.global_batch_size" in out and out.endswith("1 problem\n")
    (tmp_path / "config.yaml").write_text("nothing: 1\n")
    assert main(["validate", str(tmp_path)]) == 2 and "nothing" in capsys.readouterr().out


def _data() -> list[str]:
    data = Path(ROOT) / "configs" / "quickstart" / "data"
    return [f"data.train.0.path={data}/train.jsonl", f"data.validation.heldout.path={data}/heldout.jsonl"]
