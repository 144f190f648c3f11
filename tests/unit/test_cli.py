"""The command `torchft` and its first verb; and the lines that go to stderr."""

import json
import logging
import resource
import socket
import subprocess
import sys
import time

import pytest

import torchft
from tests.helpers.hub import serve
from torchft.cli import doctor
from torchft.cli.main import VERBS, main
from torchft.log import get_logger, setup


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def versions(monkeypatch, **installed: str | None) -> None:
    """Pretends that these distributions (dashes as underscores) have these versions; all others are as they are."""
    real = doctor.version_of
    known = {name.replace("_", "-"): version for name, version in installed.items()}
    monkeypatch.setattr(doctor, "version_of", lambda name: known[name] if name in known else real(name))


def test_help_is_quick_and_imports_no_torch():
    """`torchft --help` lists the verbs, without torch, in less than 0.3 s of CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = """import sys
from torchft.cli.main import main
try:
    main(["--help"])
finally:
    print("torch" in sys.modules, "omegaconf" in sys.modules)"""
    out = python(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "doctor" in out and out.endswith("False False\n")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_is_quick_and_imports_no_torch(verb):
    """`torchft VERB --help` names its arguments, without torch or huggingface_hub, in less than 0.3 s of CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"""import sys
from torchft.cli.main import main
try:
    main(["{verb}", "--help"])
finally:
    print([name for name in ("torch", "huggingface_hub", "numpy", "omegaconf") if name in sys.modules])"""
    out = python(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert f"torchft {verb}" in out and out.endswith("[]\n")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_doctor_reports_versions_devices_and_machine(monkeypatch, capsys):
    """Every part a bug report needs is named; a sound installation ends with 0; --json says the same."""
    versions(monkeypatch, torchft=None, torchft_llm=torchft.__version__)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {f["name"] for f in report["findings"]}
    assert report["ok"] and names >= {
        "python",
        "torchft",
        "torch",
        "cuda",
        "gloo",
        "torchao",
        "transformers",
        "cpu",
        "memory",
        "folder",
        "disk",
        "malloc",
        "hub",
        "tensorboard",
        "swanlab",
    }
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(f["text"] in text for f in report["findings"] if f["name"] not in ("memory", "disk"))


def test_doctor_finds_the_other_project_of_the_same_import_name(monkeypatch, capsys):
    """PyPI's torchft beside torchft-llm is an error with the commands that mend it, exit 1."""
    versions(monkeypatch, torchft="0.1.1", torchft_llm=torchft.__version__)
    assert main(["doctor"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("torchft "))
    assert "ERROR" in line and "fault tolerance" in line and "pip uninstall torchft torchft-llm" in line


def test_doctor_finds_another_torchft_on_the_path(monkeypatch, capsys):
    """If the imported package isn't the installed distribution's, something shadows it: exit 1."""
    versions(monkeypatch, torchft=None, torchft_llm="99.0")
    assert main(["doctor"]) == 1
    assert "torchft-llm 99.0 is installed, but `import torchft` gives" in capsys.readouterr().out


def test_doctor_missing_library_and_unwritable_folder(monkeypatch, tmp_path):
    """A missing library or a folder that can't be written to is an error; a source tree that isn't installed a warning."""
    versions(monkeypatch, torchft=None, torchft_llm=None, torchao=None)
    found = {finding.name: finding.status for finding in doctor.examine()}
    assert (found["torchft"], found["torchao"], found["torch"]) == ("warning", "error", "ok")
    assert {f.name: f.status for f in doctor.machine(tmp_path)}["folder"] == "ok"

    def refuse(**_):
        raise PermissionError("read-only")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert {f.name: f.status for f in doctor.machine(tmp_path)}["folder"] == "error"


def test_doctor_asks_the_hub_without_hanging(tmp_path):
    """A hub that answers, one that refuses, one that says nothing, and none by choice: said within seconds, exit 0."""
    silent = socket.create_server(("127.0.0.1", 0))
    with serve({}) as there, silent:
        cases = {there.port: "answers, no token", 9: "can't be reached", silent.getsockname()[1]: "can't be reached"}
        for port, words in cases.items():
            env = there.environment(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{port}")
            began = time.monotonic()
            out = subprocess.run(
                [sys.executable, "-c", "from torchft.cli.doctor import hub; print(hub().text)"], env=env, capture_output=True, text=True
            )
            assert words in out.stdout, (out.stdout, out.stderr)
            assert time.monotonic() - began < 10
        env = there.environment(tmp_path, HF_HUB_OFFLINE="1")
        out = subprocess.run(
            [sys.executable, "-c", "from torchft.cli.doctor import hub; print(hub())"], env=env, capture_output=True, text=True
        )
        assert "status='ok'" in out.stdout and "HF_HUB_OFFLINE" in out.stdout


def test_doctor_waits_no_longer_for_a_look_up_that_hangs(monkeypatch):
    """A name server that says nothing is not under the request's own time limit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # tests ask no network otherwise
    monkeypatch.setattr(doctor, "_ask", lambda url: time.sleep(30))
    monkeypatch.setattr(doctor, "HUB_TIMEOUT_S", 0.2)
    began = time.monotonic()
    finding = doctor.hub()
    assert time.monotonic() - began < 5 and finding.status == "warning" and "no answer in 0.2 s" in finding.text


def test_unknown_verb_exits_2(capsys):
    """An unknown verb is refused with the list of verbs."""
    with pytest.raises(SystemExit) as exit_:
        main(["train"])
    assert exit_.value.code == 2 and "doctor" in capsys.readouterr().err


def lines_of_rank(rank: int, capsys) -> list[str]:
    log = get_logger("torchft.some.module")
    setup(rank)
    log.info("loaded %d tensors", 3)
    log.warning("%d samples were truncated", 2)
    get_logger("__main__").info("from a script")
    log.debug("never")
    return capsys.readouterr().err.splitlines()


@pytest.fixture
def torchft_logger():
    logger = logging.getLogger("torchft")
    before = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:], level = before
    logger.setLevel(level)


def test_log_lines_by_rank(capsys, torchft_logger):
    """Information comes from rank 0 alone, warnings from every rank with its number; setting up twice doesn't double the lines."""
    assert lines_of_rank(0, capsys) == ["loaded 3 tensors", "[rank 0] warning: 2 samples were truncated", "from a script"]
    assert lines_of_rank(3, capsys) == ["[rank 3] warning: 2 samples were truncated"]


def test_importing_log_installs_nothing():
    """As a library torchft leaves logging to the program."""
    code = (
        "import logging, torchft.log as l; l.get_logger('torchft.x'); print(logging.getLogger('torchft').handlers, logging.root.handlers)"
    )
    assert python(code) == "[] []\n"
