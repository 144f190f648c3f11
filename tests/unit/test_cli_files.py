"""The verbs around files: ls, cat, cp, diff, completion; names in a checkout and in an installed wheel; --help without torch."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import torchft
from torchft.cli.main import VERBS, main
from torchft.config.load import load_config
from torchft.config.shipped import find_shipped, recipe_of, shipped
from torchft.train.recipes import load_recipe

ROOT = Path(__file__).parents[2]


def test_ls_shows_all_with_their_first_comment_line(capsys):
    """Every recipe and config of the tree is listed, each with words of its own; --names gives what cat takes."""
    assert main(["ls"]) == 0
    out = capsys.readouterr().out
    shown = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    for folder, suffix in (("recipes", ".py"), ("configs", ".yaml")):
        for path in (ROOT / folder).rglob(f"*{suffix}"):
            first = path.read_text().splitlines()[0].strip('#" ')
            assert first and shown[path.relative_to(ROOT / folder).as_posix().removesuffix(suffix)] == first
    assert main(["ls", "--names"]) == 0
    names = capsys.readouterr().out.split()
    assert names == [one.name for kind in ("recipe", "config") for one in shipped(kind)] and len(names) > 4


def test_cat_prints_the_file(capsys):
    """By name, with suffix and by path, the very bytes; a misspelt name gets a suggestion and exit 2."""
    want = (ROOT / "configs" / "debug" / "tiny.yaml").read_text()
    for name in ("debug/tiny", "debug/tiny.yaml", "configs/debug/tiny.yaml", str(ROOT / "configs/debug/tiny.yaml")):
        assert main(["cat", name]) == 0 and capsys.readouterr().out == want
    assert main(["cat", "full_fintune"]) == 2
    assert "did you mean full_finetune?" in capsys.readouterr().err


def test_cp_never_writes_over(tmp_path, capsys):
    """Into a folder or to a new file, and never over an existing one."""
    assert main(["cp", "full_finetune", str(tmp_path)]) == 0
    copy = tmp_path / "full_finetune.py"
    assert copy.read_bytes() == (ROOT / "recipes" / "full_finetune.py").read_bytes()
    assert main(["cp", "debug/tiny", str(tmp_path / "new" / "mine.yaml")]) == 0
    copy.write_text("changed")
    assert main(["cp", "full_finetune", str(tmp_path)]) == 2 and "exists" in capsys.readouterr().err
    assert copy.read_text() == "changed"


def test_diff(tmp_path, capsys):
    """Only keys that differ, with both values, includes followed; a run folder stands for its config.yaml; exit 1, or 0 if none."""
    (tmp_path / "a.yaml").write_text("optim: {lr: 1e-5}\nseed: 1\ndata: {train: [{path: x}]}\nbetas: [1, 2]\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "base.yaml").write_text("seed: 1\noptim: {lr: 1}\n")
    (run / "config.yaml").write_text("include: [base.yaml]\noptim: {lr: 0.00001}\ndata: {train: [{path: y}]}\nbetas: [1, 3]\nextra: true\n")
    assert main(["diff", str(tmp_path / "a.yaml"), str(run)]) == 1
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["data.train.0.path", "betas", "extra"]
    assert [" ".join(line[1].split()) for line in lines] == ["x y", "[1, 2] [1, 3]", "- true"]
    assert main(["diff", str(run), str(run / "config.yaml")]) == 0 and "no key differs" in capsys.readouterr().out
    assert main(["diff", "debug/tiny", "debug/tinny"]) == 2


def test_secrets_are_not_shown(tmp_path, capsys):
    """A token in either file is never printed."""
    for name, token in (("a", "hf_" + "a" * 30), ("b", "hf_" + "b" * 30)):
        (tmp_path / f"{name}.yaml").write_text(f"hf_token: {token}\nname: {name}\n")
    main(["diff", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    assert "hf_aaa" not in capsys.readouterr().out


def test_every_config_names_a_recipe_that_loads_it():
    """The recipe of each config is the one of its first comment, and its config class takes every key of the file."""
    for config in shipped("config"):
        recipe = load_recipe(find_shipped(recipe_of(config), "recipe").path)
        given = [f"{key}=x" for key in sorted(OmegaConf.missing_keys(OmegaConf.load(config.path)))]
        load_config(recipe.Config, ["--config", str(config.path), *given], description="")


def test_names_of_an_installed_wheel(tmp_path):
    """With recipes/ and configs/ inside torchft/, as a wheel has them, the same names are found from any folder."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "torchft", site / "torchft", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("recipes", "configs"):
        shutil.copytree(ROOT / folder, site / "torchft" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    calls = "main(['ls', '--names']); main(['cat', 'generate'])"
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from torchft.cli.main import main; {calls}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert out.startswith("full_finetune\n") and (ROOT / "recipes" / "generate.py").read_text() in out
    assert str(site) not in torchft.__file__


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_each_verb_is_quick_and_without_torch(verb):
    """`torchft VERB --help` takes less than 0.3 s of CPU time and imports neither torch nor omegaconf."""
    code = f"""import sys
from torchft.cli.main import main
try:
    main([{verb!r}, "--help"])
finally:
    print("torch" in sys.modules, "omegaconf" in sys.modules)"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert out.startswith(f"usage: torchft {verb}") and out.endswith("False False\n")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize(
    "words, expected", [(["va"], "validate"), (["run", "full"], "full_finetune"), (["cat", "quickstart/f"], "quickstart/full")]
)
def test_bash_completion(tmp_path, words, expected):
    """The script that bash sources offers verbs, then names."""
    command = tmp_path / "torchft"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m torchft.cli.main "$@"\n')
    command.chmod(0o755)
    line = " ".join(words)
    script = f"""export PATH={tmp_path}:$PATH; source <(torchft completion bash)
COMP_WORDS=(torchft {line}); COMP_CWORD={len(words)}; _torchft; echo "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [expected], done


def test_zsh_completion_names_every_verb(capsys):
    """The zsh script has all verbs (zsh itself need not be installed)."""
    assert main(["completion", "zsh"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#compdef torchft") and all(verb in out for verb in VERBS)


def test_settings_on_both_sides_of_an_option(capsys):
    """key=value is read before and after options; a word that is neither is refused."""
    assert main(["run", "full_finetune", "seed=1", "--nproc", "1", "optim.lr=oops", "train.steps=1"]) == 2
    assert "optim.lr" in capsys.readouterr().err
    for wrong in (["run", "full_finetune", "--lr", "3"], ["ls", "more"], ["validate", "debug/tiny", "word"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2 and "unrecognized" in capsys.readouterr().err
