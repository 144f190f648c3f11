"""Everything a training recipe needs, built in the one right order: `build_job(cfg, run)`.

    checks --> text, caches --> loader, schedule --> stages on meta --> parallelize --> optimizer --> resume, or weights

Nothing is allocated before every check has passed. A recipe's loop then uses the Job's parts.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer

from torchft.batch import Loss
from torchft.checkpoint.hf import load_hf
from torchft.checkpoint.load import load_weights_only
from torchft.checkpoint.store import Store
from torchft.data.cache import TokenCache
from torchft.data.loader import DataConfig, Loader
from torchft.data.text import TextDataConfig
from torchft.dtypes import DTYPES
from torchft.errors import ConfigError, Problem
from torchft.log import get_logger
from torchft.losses.cross_entropy import build_loss
from torchft.models.build import read_config
from torchft.models.custom import CustomSpec, custom_spec
from torchft.models.init import init_weights
from torchft.models.spec import ModelSpec
from torchft.optim.build import build_optimizer
from torchft.optim.schedules import build_schedule
from torchft.parallel.apply import parallelize
from torchft.parallel.mesh import Mesh
from torchft.parallel.parts import Parts
from torchft.parallel.pp import build_stages
from torchft.train.checks import check_job
from torchft.train.data import Rows, Text, build_loader, build_text, build_tokens, check_vocabulary, validation_passes
from torchft.train.run import Run
from torchft.train.step import NonFinite, evaluate

log = get_logger(__name__)


@dataclass
class ModelConfig:
    path: str | None = None  # HF folder: config.json and safetensors (scripts/convert_checkpoint.py makes one)
    family: str | None = None  # instead of path: a family, such as llama ...
    size: str | None = None  # ... and one of its named sizes ...
    spec: CustomSpec = field(default_factory=CustomSpec)  # ... or, or with, numbers of your own
    init: Literal["weights", "random"] = "weights"  # weights: read them from path; random: fresh from the seed

    def check(self) -> Iterator[Problem]:
        if bool(self.path) == bool(self.family):
            given = f"{self.path!r} and model.family={self.family!r}"
            yield Problem("model.path", given, "a HF folder, or model.family with model.size", "give exactly one of them")
        elif self.path and self.spec.given():
            fix = "leave model.spec out, or give model.family instead of model.path"
            yield Problem("model.spec", ", ".join(self.spec.given()), "nothing: config.json in model.path has the numbers", fix)
        elif self.family and not self.size and self.spec.missing():
            expected = f"a named size of {self.family}, or model.spec with {', '.join(self.spec.missing())}"
            yield Problem("model.size", "nothing", expected, "see docs/models.md for the sizes")
        elif self.family and self.init == "weights":
            yield Problem("model.init", "weights", "random, since model.family has no weights", "set model.init=random, or give model.path")


@dataclass
class TrainConfig:
    steps: int | None = None  # optimizer steps in all; or give epochs
    epochs: float | None = None  # passes over the data, parts allowed; or give steps
    global_batch_size: int = 8  # rows (packs, or samples without packing) of one optimizer step over all ranks
    micro_batch_size: int = 1  # rows at once on one rank; the rest is accumulated
    nonfinite: NonFinite = field(default_factory=NonFinite)  # what to do when loss or gradients are not finite

    def check(self) -> Iterator[Problem]:
        if (self.steps is None) == (self.epochs is None):
            yield Problem("train.steps", f"{self.steps} with train.epochs={self.epochs}", "exactly one of the two", "set one of them")
        for key in ("steps", "epochs", "global_batch_size", "micro_batch_size"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                yield Problem(f"train.{key}", str(value), "more than 0", "use a positive number")


@dataclass
class ValidateConfig:
    every_steps: int = 0  # validate every so many steps and at the end; 0: never
    at_start: bool = False  # also before the first step

    def check(self) -> Iterator[Problem]:
        if self.every_steps < 0:
            yield Problem("validate.every_steps", str(self.every_steps), "0 or more", "use 0 for never")

    def is_due(self, step: int, *, last: int) -> bool:
        """True after every `every_steps` steps and after the last."""
        return self.every_steps > 0 and (step % self.every_steps == 0 or step == last)


@dataclass
class Job:
    """A run's parts, ready to step."""

    spec: ModelSpec
    text: Text
    parts: Parts
    loss: Loss
    optimizer: Optimizer
    schedule: Callable[[int], float]  # step -> learning rate
    loader: Loader
    store: Store
    rows: Rows
    data: DataConfig | TextDataConfig
    validation: dict[str, TokenCache]
    num_steps: int

    def validate(self) -> dict[str, dict[str, float]]:
        """Every validation source's metrics, by source, on every rank."""
        passes = validation_passes(self.validation, self.data, self.rows, self.text)
        return {name: evaluate(self.parts, steps, self.loss) for name, steps in passes.items()}


def build_job(cfg, run: Run) -> Job:
    """cfg: a recipe's config. Raises ConfigError, DataError or CheckpointError; a rank that fails alone is ended by the launcher."""
    mesh, world = run.mesh, run.world
    spec = read_config(cfg.model.path)[0] if cfg.model.path else custom_spec(cfg.model.family, cfg.model.size, cfg.model.spec)
    problems = list(check_job(cfg, spec, mesh))
    if problems:
        raise ConfigError(problems)
    text = build_text(cfg.tokenizer, cfg.model.path)
    problems = list(check_vocabulary(spec, text))
    if problems:
        raise ConfigError(problems)
    tokens = build_tokens(cfg.data, text, world)
    rows = Rows(cfg.train.micro_batch_size, row_multiple(mesh), mesh)
    loader = build_loader(tokens.train, cfg.data, rows, text, global_batch_size=cfg.train.global_batch_size, seed=cfg.seed)
    build_schedule(cfg.schedule, cfg.optim.lr, cfg.train.steps or loader.num_steps(cfg.train.epochs))  # raises if it does not fit
    parts = build_parts(cfg, spec, mesh)
    optimizer = build_optimizer(parts.named_parameters(copies=True), cfg.optim)
    saved: dict[str, Any] = {}  # filled below; the store asks for it at each save
    store = Store(
        run.folder / "checkpoints",
        parts,
        optimizer,
        cfg.checkpoint,
        extra_state=lambda: {**run.counters(), "loader": loader.state(), **saved},
        config_hash=run.config_hash,
        mesh=mesh.degrees,
    )
    state = store.resume()
    if state is None:
        load_initial_weights(cfg, spec, parts)
    else:
        loader.load_state(state["loader"])
        run.restore(state)
    num_steps = cfg.train.steps or loader.num_steps(cfg.train.epochs)
    saved["schedule"] = {**asdict(cfg.schedule), "lr": cfg.optim.lr, "num_steps": num_steps}
    if state is not None:
        _check_schedule(saved["schedule"], state["schedule"])
    schedule = build_schedule(cfg.schedule, cfg.optim.lr, num_steps)
    run.begin(spec, parts, num_steps=num_steps, seq_len=cfg.data.seq_len)
    return Job(spec, text, parts, build_loss(cfg.loss), optimizer, schedule, loader, store, rows, cfg.data, tokens.validation, num_steps)


def _check_schedule(given: dict[str, Any], saved: dict[str, Any]) -> None:
    """A resumed run keeps its learning-rate curve: another one would bend it in the middle, in silence."""
    changed = {key: (value, saved.get(key)) for key, value in given.items() if key != "allow_change" and value != saved.get(key)}
    if changed and not given["allow_change"]:
        fix = "keep the checkpoint's values, or set schedule.allow_change=true to bend the curve from here on"
        raise ConfigError(
            Problem(f"schedule ({key})", str(new), f"{old}, as in the checkpoint", fix) for key, (new, old) in changed.items()
        )


def build_parts(cfg, spec: ModelSpec, mesh: Mesh) -> Parts:
    """The parallelised model, allocated, its values not yet set."""
    modules = build_stages(spec, mesh, DTYPES[cfg.precision.params])
    return parallelize(modules, mesh, cfg.parallel, precision=cfg.precision, memory=cfg.memory, compile=cfg.compile)


def load_initial_weights(cfg, spec: ModelSpec, parts: Parts) -> None:
    """The weights a new run starts from: another run's checkpoint, a HF folder, or the seed."""
    named = list(parts.named_parameters(copies=True))
    if cfg.checkpoint.load:
        load_weights_only(Path(cfg.checkpoint.load), parts)
        log.info("weights of %s", cfg.checkpoint.load)
    elif cfg.model.init == "random":
        init_weights(named, spec, cfg.seed)
        log.info("random weights from seed %d", cfg.seed)
    else:
        report = load_hf(cfg.model.path, spec, named)
        log.info("weights of %s: %d tensors, %.2f GiB on this rank", cfg.model.path, report.num_tensors, report.num_bytes / 2**30)


def row_multiple(mesh: Mesh) -> int:
    """What a row's length must divide by: sequence parallelism splits it over tp."""
    return mesh.degrees["tp"]
