"""The generation recipe: prompts of every form in, one line each out; the same samples however it is run; stopped runs go on."""

import json
from pathlib import Path

import pytest

from tests.helpers.models import make_model
from tests.helpers.recipe import arguments, load_recipe, train
from torchft.data.prompts import PromptsConfig, read_prompts
from torchft.data.types import Message
from torchft.errors import ConfigError, DataError
from torchft.generate.generate import generate
from torchft.generate.model import find_model, open_model
from torchft.generate.sampling import SamplingConfig

QUESTIONS = ["Hello", "Table for two on Monday?", "x", "What is it, and where?", "日本 é", "one two three", "y z"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return path


def run(model: Path, prompts: Path, output: Path, *more: str) -> list[dict]:
    options = ("sampling.temperature=1.0", "sampling.num_samples=2", "sampling.max_new_tokens=6", "device=cpu")
    argv = [f"model.path={model}", f"prompts.path={prompts}", f"output={output}", *options, *more]
    assert load_recipe("generate").main(argv) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_rows(model, prompts, tmp_path):
    """One row a prompt in order, n samples each with their reasons, equal to the library's own samples of the training template."""
    rows = run(model, prompts, tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == QUESTIONS and [row["index"] for row in rows] == list(range(7))
    opened = open_model(model)
    ids = [opened.template.prompt([Message("user", text)]) for text in QUESTIONS]
    cfg = SamplingConfig(max_new_tokens=6, temperature=1.0, num_samples=2)
    done = generate(opened.decoder, ids, cfg=cfg, stop_ids=opened.stop_ids, tokenizer=opened.tokenizer)
    assert [text for row in rows for text in row["samples"]] == [c.text for c in done]
    assert [reason for row in rows for reason in row["finish"]] == [c.finish for c in done]
    assert len({text for row in rows for text in row["samples"]}) > 10


def test_any_batch_size_gives_the_same(model, prompts, tmp_path):
    """1, 3 or 16 samples at once: the same file."""
    files = [run(model, prompts, tmp_path / f"{size}.jsonl", f"batch_size={size}") for size in (1, 3, 16)]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("cut", ["between lines", "inside a line", "empty"])
def test_goes_on_with_a_partial_output(model, prompts, tmp_path, cut):
    """Cut anywhere, the file is completed to the same bytes, and the rows that were there are not made again."""
    out = tmp_path / "out.jsonl"
    run(model, prompts, out, "batch_size=2")
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes({"between lines": b"".join(lines[:3]), "inside a line": b"".join(lines[:3]) + lines[3][:20], "empty": b""}[cut])
    recipe, seen = load_recipe("generate"), []
    argv = [f"model.path={model}", f"prompts.path={prompts}", f"output={out}", "sampling.temperature=1.0", "sampling.num_samples=2"]
    real, recipe.generate = recipe.generate, lambda *args, ids, **options: seen.extend(ids) or real(*args, ids=ids, **options)
    assert recipe.main([*argv, "sampling.max_new_tokens=6", "device=cpu"]) == 0
    assert out.read_bytes() == whole and seen == list(range(0 if cut == "empty" else 3, 7))
    assert recipe.main([*argv, "sampling.max_new_tokens=6", "device=cpu"]) == 0 and out.read_bytes() == whole


def test_another_file_is_never_written_over(model, prompts, tmp_path):
    """Other settings, other prompts, or a file of something else: an error that names the key or the line, the file unchanged."""
    out = tmp_path / "out.jsonl"
    run(model, prompts, out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=r"sampling.seed[\s\S]*0, as"):
        run(model, prompts, out, "sampling.seed=4")
    prompts.write_text(json.dumps({"prompt": "another"}) + "\n")
    with pytest.raises(DataError, match=r"out.jsonl:1: of another prompt"):
        run(model, prompts, out)
    assert out.read_bytes() == before
    (tmp_path / "notes.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match="notes.jsonl exists"):
        run(model, prompts, tmp_path / "notes.jsonl")


def test_prompt_forms(tmp_path):
    """Lines, prompt, messages, sharegpt and alpaca become the same prompt; a reply at the end is kept apart."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    records = [
        ({"prompt": "Hi"}, None),
        ({"messages": chat[:1]}, None),
        ({"messages": chat}, "Ho"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, "Ho"),
        ({"instruction": "Hi"}, None),
        ({"instruction": "Hi", "output": "Ho"}, "Ho"),
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record, _ in records))
    found = read_prompts(PromptsConfig(str(tmp_path / "p.jsonl")))
    assert [p.expected for p in found] == [expected for _, expected in records]
    assert all([(m.role, m.content) for m in p.messages] == [("user", "Hi")] for p in found)
    (tmp_path / "p.txt").write_text("Hi\r\n\n  two words \n")
    lines = read_prompts(PromptsConfig(str(tmp_path / "p.txt")))
    assert [(p.text, p.where.rpartition(":")[2]) for p in lines] == [("Hi", "1"), ("  two words ", "3")]


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"promt": "x"}', "promt"),
        ('{"prompt": 3}', "expected a text"),
        ('{"prompt": ', "p.jsonl:2"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "nothing but a reply"),
    ],
)
def test_bad_prompts_name_file_and_line(tmp_path, line, words):
    """A record that is no prompt is an error at its line."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match="p.jsonl:2") as error:
        read_prompts(PromptsConfig(str(tmp_path / "p.jsonl")))
    assert words in str(error.value)


def test_raw_prompts(model, tmp_path):
    """raw continues the text itself, without a template; a chat then is an error, and a too long prompt names its line."""
    (tmp_path / "p.txt").write_text("Table for\n")
    rows = run(model, tmp_path / "p.txt", tmp_path / "out.jsonl", "prompts.raw=true")
    opened = open_model(model, template=None)
    ids = [opened.tokenizer.bos_id] * opened.tokenizer.adds_bos + opened.tokenizer.encode("Table for")
    cfg = SamplingConfig(max_new_tokens=6, temperature=1.0, num_samples=2)
    done = generate(opened.decoder, [ids], cfg=cfg, stop_ids=opened.stop_ids, tokenizer=opened.tokenizer)
    assert rows[0]["samples"] == [c.text for c in done]
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(DataError, match=r"p.jsonl:1: prompts.raw"):
        run(model, tmp_path / "p.jsonl", tmp_path / "raw.jsonl", "prompts.raw=true")
    (tmp_path / "p.txt").write_text("short\n" + "long " * 9000 + "\n")
    with pytest.raises(DataError, match=r"p.txt:2: given \d+ tokens"):
        run(model, tmp_path / "p.txt", tmp_path / "long.jsonl")


def test_run_folders(tmp_path):
    """Of a run the export is opened, or a newer checkpoint; both give the same text for the same step, template included."""
    folder = tmp_path / "run"
    options = ("train.steps=3", "checkpoint.every_steps=3", "validate.every_steps=0", "tokenizer.template=chatml")
    assert train(arguments(folder, tmp_path / "cache", *options)) == 0
    (export,) = (folder / "export").iterdir()
    assert find_model(folder) == export
    checkpoint = folder / "checkpoints" / "step_00000003"
    opened = [open_model(path) for path in (folder, checkpoint)]
    assert opened[0].template.digest == opened[1].template.digest or opened[0].template.source == opened[1].template.source
    prompt = opened[0].template.prompt([Message("user", "Table for two")])
    assert prompt == opened[1].template.prompt([Message("user", "Table for two")])
    texts = [generate(m.decoder, [prompt], cfg=SamplingConfig(max_new_tokens=8), tokenizer=m.tokenizer)[0].text for m in opened]
    assert texts[0] == texts[1]
    export.rename(export.with_name("step_00000001"))
    assert find_model(folder) == checkpoint
