"""The project itself: what an import costs, what a wheel holds, what the house rules forbid, and that the rules bite."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "torchft").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORBIDDEN = r"weights_only\s*=\s*False|\bpickle\.loads?\b|(?<![\w.])eval\(|shell\s*=\s*True|trust_remote_code\s*=\s*True|yaml\.load\("


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def imports(path: Path) -> set[str]:
    """The names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "."} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_importing_the_package_imports_nothing():
    """`import torchft` loads no torch nor any other library, and no module of ours but itself."""
    code = "import sys; before = set(sys.modules); import torchft; print(sorted(set(sys.modules) - before))"
    assert run(sys.executable, "-c", code).stdout == "['torchft']\n"


def test_every_test_that_the_docs_name_exists():
    """`file::test` in docs/testing.md is a function of a file of that name."""
    tests = {
        (path.stem, name) for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    named = re.findall(r"`(test_\w+)::(test_\w+)`", (ROOT / "docs" / "testing.md").read_text())
    assert len(named) > 40 and not set(named) - tests


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_house_rules(path):
    """No unsafe calls, no environment reads outside dist.py, no empty words for names, a docstring on top, empty __init__ files."""
    text = path.read_text()
    assert not re.search(FORBIDDEN, text), re.search(FORBIDDEN, text)
    assert path.name == "dist.py" or not re.search(r"\benviron\b|\bgetenv\b", text), "only dist.py reads the environment"
    assert path.stem not in ("util", "utils", "helper", "helpers", "common", "misc")
    if path.name == "__init__.py" and path.parent != ROOT / "torchft":
        assert text == ""
    else:
        assert ast.get_docstring(ast.parse(text)), "no docstring on top"


def test_the_forbidden_calls_are_recognised():
    """The patterns match what they are for, and nothing harmless."""
    for call in (
        "torch.load(p, weights_only=False)",
        "pickle.load(f)",
        "pickle.loads(b)",
        "x = eval(s)",
        "run(c, shell = True)",
        "yaml.load(f)",
    ):
        assert re.search(FORBIDDEN, call), call
    for call in ("model.eval()", "torch.ao.eval(m)", "torch.load(p, weights_only=True)", "pickle.Unpickler(f)", "yaml.compose(t)"):
        assert not re.search(FORBIDDEN, call), call


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")) + sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_recipes_import_the_package_only(path):
    """Recipes and examples import torchft, never its command line and never each other."""
    siblings = {p.stem for p in path.parent.glob("*.py")}
    for name in imports(path):
        assert not name.startswith("torchft.cli") and name.split(".")[0] not in siblings | {"recipes", "examples", "tests"}, name


def test_constraints_meet_the_floors():
    """Every core and dev dependency is pinned in constraints.txt at a version that its floor allows; torch without a local suffix."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    requirements = [Requirement(r) for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    for requirement in requirements:
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), (str(requirement), version)
        assert all(part.operator == ">=" for part in requirement.specifier), f"{requirement}: floors only"
    assert pinned["torch"] == "2.13.0"


def test_wheel_holds_package_recipes_and_configs(tmp_path):
    """A wheel has one top-level name, the type marker, the recipes and configs of this tree, and the command `torchft`."""
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (wheel,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"torchft", "torchft_llm"}
    expected = {p.relative_to(ROOT).as_posix() for p in [*PACKAGE, ROOT / "torchft/py.typed"]}
    shipped = [p for folder in ("recipes", "configs") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml")]
    expected |= {f"torchft/{p.relative_to(ROOT).as_posix()}" for p in shipped}
    assert expected <= names, expected - names
    assert "torchft = torchft.cli.main:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.fixture
def copy(tmp_path):
    """The package and its settings, to plant bugs in."""
    shutil.copytree(ROOT / "torchft", tmp_path / "torchft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text", "broken"),
    [
        ("torchft/data/planted.py", "import torchft.models.spec\n", ["Data sees neither"]),
        ("torchft/models/planted.py", "def f():\n    import torchft.parallel.mesh\n", ["Layers"]),
        ("torchft/losses/planted.py", "import transformers\n", ["The reference implementations"]),
        ("torchft/planted.py", "", ["Layers"]),
    ],
)
def test_layers_are_enforced(copy, file, text, broken):
    """An import upwards, a lazy one too, data that sees a model, an oracle in the package or a module outside the layers fails lint."""
    (copy / file).write_text(text)
    result = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache", cwd=copy)
    assert result.returncode == 1, result.stdout
    output = result.stdout + result.stderr
    assert all(re.search(rf"{name}.* BROKEN", output) for name in broken), output


def test_layers_hold():
    """The tree as it is passes."""
    result = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "lines", "function"),
    [
        ("torchft/x.py", 501, 1),
        ("torchft/models/families/x.py", 161, 1),
        ("recipes/x.py", 221, 1),
        ("examples/x.py", 61, 1),
        ("torchft/x.py", 90, 81),
    ],
)
def test_size_caps(tmp_path, file, lines, function):
    """One line over a cap fails and names the place; at the cap it passes."""
    for excess, code in ((0, 1), (1, 0)):
        body = ["def f():"] + ["    x = 1"] * (function - 1 - (excess if function > 1 else 0)) if function > 1 else []
        text = body + ["x = 1"] * (lines - len(body) - (excess if function == 1 else 0))
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("\n".join(text) + "\n")
        result = run(sys.executable, str(ROOT / "scripts/size.py"), str(tmp_path))
        assert result.returncode == code, result.stdout + result.stderr
        assert ("over the cap: " + file in result.stderr) == bool(code)


def test_size_of_this_tree():
    """Every file and function is within its cap."""
    result = run(sys.executable, "scripts/size.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("largest files") and "largest functions" in result.stdout


@pytest.mark.parametrize(
    ("target", "command"),
    [("quickstart", "scripts/quickstart.py"), ("pretrain", "scripts/pretrain_demo.py"), ("test", 'pytest -m "not full"'),
     ("test-full", "-m pytest"), ("lint", "lint-imports"), ("size", "scripts/size.py"), ("bench", "benchmarks/throughput.py")],
)  # fmt: skip
def test_every_make_target_creates_the_environment_first(tmp_path, target, command):
    """On a fresh clone any target makes the virtual environment, torch first, and then does its work."""
    plan = run("make", "-n", f"VENV={tmp_path}/venv", target).stdout
    steps = ["-m venv", "-c constraints.txt torch", "-c constraints.txt -e '.[dev]'", command]
    positions = [plan.index(step) for step in steps]
    assert positions == sorted(positions)


def test_every_test_file_is_collected():
    """`make test` sees each tests/**/test_*.py, tests/dist too, which pytest's own list of ignored folders would leave out."""
    listed = run(sys.executable, "-m", "pytest", "--collect-only", "-q").stdout.splitlines()
    collected = {line.split("::")[0] for line in listed if "::" in line}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    assert files <= collected, sorted(files - collected)
