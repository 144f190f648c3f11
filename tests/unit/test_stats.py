"""`torchft data stats` and `prepare`: the numbers are those of the arrays and of the order that training takes."""

import json

import numpy as np
import pytest

from tests.helpers.caches import make_cache
from tests.helpers.recipe import ROOT, arguments
from torchft.cli.main import main
from torchft.data.loader import Loader
from torchft.data.mixture import MixtureConfig, Share, build_mixture
from torchft.data.stats import as_text, epoch_stats, source_stats


def test_source_by_hand():
    """Three samples of 4, 9 and 4 tokens; ids begin at 1000 * i, so id 3 is the last of the first, and trained there alone."""
    cache = make_cache([4, 9, 4])
    cache.ids[13:17] = cache.ids[0:4]  # the third is the first once more
    (stats,) = source_stats([cache], frozenset({3, 0}))
    assert (stats.total, stats.kept, stats.tokens, stats.trained) == (3, 3, 17, 3 + 6 + 3)
    assert stats.stop_trained == 2 and stats.duplicates == 1 and stats.lengths == {"0%": 4, "5%": 4, "50%": 4, "95%": 9, "100%": 9}
    assert stats.histogram == [(8, 2), (16, 1)]
    (first,) = source_stats([cache], frozenset({0, 1001}))  # a sample's first token and a prompt's, neither trained
    assert first.stop_trained == 0
    (none,) = source_stats([cache], frozenset({2000}))
    assert none.stop_trained == 0 and "never learns to stop" in as_text([none], None) and "never" not in as_text([stats], None)


def test_duplicates_across_sources():
    """The first of equal samples is none; an equal one in another source is."""
    first, second = source_stats([make_cache([4, 5], "a"), make_cache([4, 6], "b")], frozenset())
    assert (first.duplicates, second.duplicates) == (0, 1)


@pytest.mark.parametrize("packing", [True, False, "cut"])
def test_epoch_is_what_the_loader_makes(packing):
    """Rows, steps, tokens, fill and shares of the first epoch, counted on the batches themselves."""
    caches = [make_cache([2 + i % 9 for i in range(30)], "a"), make_cache([11, 12, 5], "b")]
    mix = build_mixture([Share(), Share(epochs=2)], MixtureConfig(), sizes=[30, 3], tokens=[c.counts.tokens for c in caches])
    loader = Loader(caches, seq_len=12, micro_batch_size=1, global_batch_size=4, packing=packing, mixture=mix)
    stats = epoch_stats(loader)
    batches = [batch for _ in range(loader.steps_per_epoch(0)) for batch in loader.next_step() if batch.num_tokens]
    assert stats.steps == loader.steps_per_epoch(0) == loader.cursor.step and stats.rows == len(batches)
    assert stats.tokens == sum(b.num_tokens for b in batches) and stats.samples == 36
    assert stats.fill == pytest.approx(stats.tokens / sum(b.tokens.numel() for b in batches))
    (a, b) = stats.shares
    assert a == ("a", pytest.approx(30 / 36), pytest.approx(caches[0].counts.tokens / stats.tokens)) and b[1] == pytest.approx(6 / 36)


def lines_of(capsys) -> str:
    return capsys.readouterr().out


def command(view: str, tmp_path, *more: str) -> list[str]:
    _, config, *overrides = arguments(tmp_path / "run", tmp_path / "cache")
    return ["data", view, config, *overrides, *more]


def test_commands(tmp_path, capsys):
    """show, stats and prepare on the debug config: text and JSON; two processes make the cache that stats then reads; nothing is left of
    a run."""
    assert main(command("prepare", tmp_path, "--nproc", "2")) == 0
    assert "304 of 304 samples" in lines_of(capsys) and len(list((tmp_path / "cache").iterdir())) == 2
    assert main(command("stats", tmp_path, "--json")) == 0
    stats = json.loads(lines_of(capsys))
    assert [source["kept"] for source in stats["sources"]] == [304, 80] and stats["epoch"]["samples"] == 304
    assert stats["sources"][0]["stop_trained"] == 304
    assert main(command("stats", tmp_path, "data.validation_size=0.25")) == 0
    assert "split: 76 of 76 samples" in lines_of(capsys)
    assert main(command("show", tmp_path, "--json", "-n", "1", "--source", "validation/heldout", "--first", "3")) == 0
    (sample,) = json.loads(lines_of(capsys))
    assert sample["where"].endswith("heldout.jsonl:4") and {t["role"] for t in sample["tokens"]} >= {"user", "assistant", "template"}
    assert not (tmp_path / "run").exists()


def test_only(tmp_path, capsys):
    """--only longest: the longest of all records; truncated and dropped: those alone; --html writes a page."""
    main(command("show", tmp_path, "--json", "-n", "2", "--source", "train/0", "--only", "longest"))
    longest = json.loads(lines_of(capsys))
    main(command("show", tmp_path, "--json", "-n", "1000", "--source", "train/0"))
    lengths = sorted((len(s["tokens"]) for s in json.loads(lines_of(capsys))), reverse=True)
    assert [len(s["tokens"]) for s in longest] == lengths[:2] and len(lengths) == 304
    limit = int(np.median(lengths))
    for only, policy in (("truncated", "left"), ("dropped", "drop")):
        main(
            command(
                "show",
                tmp_path,
                "--json",
                "-n",
                "1000",
                "--source",
                "train/0",
                "--only",
                only,
                f"data.seq_len={limit}",
                f"data.truncation={policy}",
            )
        )
        found = json.loads(lines_of(capsys))
        assert len(found) == sum(n > limit for n in lengths) and all(s["fate"].startswith(only) for s in found)
    assert main(command("show", tmp_path, "--html", str(tmp_path / "x.html"))) == 0 and "<html" in (tmp_path / "x.html").read_text()


def test_preference_data_is_shown(tmp_path, capsys):
    """Both sides of a pair, each named; a labelled reply under its label; a text is a document."""
    prompt = [{"role": "user", "content": "x"}]
    good, bad = ([{"role": "assistant", "content": c}] for c in "yz")
    records = [
        {"prompt": prompt, "chosen": good, "rejected": bad},
        {"prompt": prompt, "completion": bad, "label": False},
        {"text": "a b c"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert main(command("show", tmp_path, "--json", "-n", "9", "--source", "train/0", f"data.train.0.path={tmp_path}/pairs.jsonl")) == 0
    shown = json.loads(lines_of(capsys))
    assert [s["where"].split("jsonl:")[1] for s in shown] == ["1 (chosen)", "1 (rejected)", "2 (bad)", "3"]
    assert [[t["text"] for t in s["tokens"] if t["role"] == "assistant"] for s in shown] == [["y"], ["z"], ["z"], []]
    assert {t["role"] for t in shown[3]["tokens"]} == {"document"}


def test_errors(tmp_path, capsys):
    """An unknown source, a config without data: exit code 2 and what is expected."""
    assert main(command("show", tmp_path, "--source", "train/7")) == 2
    assert "one of train/0, validation/heldout" in capsys.readouterr().err
    assert main(["data", "show", str(ROOT / "configs/debug/tiny.yaml"), "--recipe", "generate"]) == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n{oops\n')
    assert main(command("prepare", tmp_path, "--nproc", "2", f"data.train.0.path={bad}")) == 2
    assert "bad.jsonl:2:" in capsys.readouterr().err
