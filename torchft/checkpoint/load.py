"""Loading a checkpoint: is it whole, does it fit, and only then its tensors. All functions are collective.

Rank 0 compares sizes, the ranks share the hashing of the files, and every rank gets the same verdict. Names, shapes and dtypes are compared
both ways with the manifest before a parameter is touched. The world size and the mesh may differ from those of the save.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer

from torchft.checkpoint import state as states
from torchft.checkpoint.folder import CheckpointFolder
from torchft.checkpoint.manifest import MANIFEST, Manifest, TensorInfo, read_manifest, read_state, verify, wrong_hashes
from torchft.checkpoint.reader import ADVICE, load_tensors
from torchft.checkpoint.state import Difference, HasParameters
from torchft.dist import agreed, on_rank_0, over_ranks, rank, world_size
from torchft.errors import CheckpointError
from torchft.log import get_logger

Thoroughness = Literal["quick", "full"]
logger = get_logger(__name__)


def load_weights_only(path: Path, parts: HasParameters, *, base: dict[str, str] | None = None, how: Thoroughness = "full") -> Manifest:
    """Fills the parameters from another run's checkpoint (or a run folder's newest good one); nothing else of it is used.

    All parameters must be there, frozen ones too, unless that run had frozen them on the same `base` ({path, sha256}), which then
    is in place already. Shapes must agree; another dtype is cast, and said. Raises CheckpointError before anything is touched.
    """
    folder = find_checkpoint(Path(path), how)
    manifest, state = read_checkpoint(folder)
    given = manifest.tensors["model"]
    expected = states.merge(over_ranks(states.tensor_infos(states.model_tensors(parts, frozen=True))))
    if state["base"] and base and state["base"]["sha256"] == base["sha256"]:
        expected = {name: info for name, info in expected.items() if name in given or name in parts.trainable}
    _raise_differences(folder, states.differences("model", _shapes(given), _shapes(expected)))
    cast = sum(given[name].dtype != expected[name].dtype for name in given)
    if cast and rank() == 0:
        logger.warning("%d of %d parameters of %s have another dtype and are cast", cast, len(given), folder)
    _load_parameters(folder, parts, given)
    return manifest


def load_training(folder: Path, parts: HasParameters, optimizer: Optimizer, base: dict[str, str] | None) -> dict[str, Any]:
    """Fills the trainable parameters and the optimizer; state.json's content.

    Raises CheckpointError with a table, nothing changed, if the checkpoint is not of this model, optimizer, set of trainable
    parameters or frozen base; and if it holds the model alone.
    """
    manifest, state = read_checkpoint(folder)
    if state.get("model_only"):
        raise CheckpointError(
            f"{folder} can't be resumed\n  given:    the weights alone (checkpoint.model_only)\n  expected: optimizer state as well\n"
            f"  fix:      start a new run from its weights: checkpoint.load={folder} with another output_dir"
        )
    saved = state["optimizer"]
    fresh = agreed(lambda: states.materialise(optimizer))
    try:
        tensors = agreed(lambda: states.optimizer_tensors(optimizer, without=saved["stateless"]))
        rows = _model_differences(manifest, parts) + _optimizer_differences(manifest, saved, optimizer, tensors)
        hashes = [(origin or {}).get("sha256", "none") for origin in (state["base"], base)]
        rows += [("sha256 of the frozen base", *hashes)] if hashes[0] != hashes[1] else []
        quants = [(origin or {}).get("quant", "none") for origin in (state["base"], base)]
        rows += [("quant of the frozen base", *quants)] if quants[0] != quants[1] else []
        _raise_differences(folder, rows)
    except CheckpointError:
        states.forget(optimizer, fresh)
        raise
    _load_parameters(folder, parts, manifest.tensors["model"])
    load_tensors(folder / "optimizer", tensors)
    changed = {row for rows in over_ranks(states.restore_options(optimizer, saved)) for row in rows}
    if changed and rank() == 0:
        logger.warning("CHECKPOINT: options of the optimizer changed, this run's are used:\n%s", states.table(sorted(changed)))
    return state


def find_checkpoint(path: Path, how: Thoroughness = "full") -> Path:
    """The checkpoint at a path, or the newest good one of a run folder or its checkpoints/. Raises CheckpointError."""
    if on_rank_0((path / MANIFEST).exists):
        raise_if_damaged(path, how)
        return path
    folder = path / "checkpoints" if on_rank_0((path / "checkpoints").is_dir) else path
    found = newest_good(on_rank_0(CheckpointFolder(folder).list_steps), how)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint there; give a step_* folder, or a run folder whose checkpoints/ holds some")
    return found


def newest_good(paths: list[Path], how: Thoroughness) -> Path | None:
    """The first of `paths` that verifies, with a warning for each that doesn't. CheckpointError if there are some and all are damaged."""
    for path in paths:
        problems = problems_of(path, how)
        if not problems:
            return path
        if rank() == 0:
            logger.warning("CHECKPOINT DAMAGED, falling back to an older one:\n  %s", "\n  ".join(problems))
    if paths:
        raise CheckpointError(f"all {len(paths)} checkpoints in {paths[0].parent} are damaged: move them away to start anew")
    return None


def raise_if_damaged(path: Path, how: Thoroughness) -> None:
    """CheckpointError that names every damaged file of a checkpoint."""
    problems = problems_of(path, how)
    if problems:
        raise CheckpointError(f"{path} is not a good checkpoint:\n  " + "\n  ".join(problems) + ADVICE)


def problems_of(path: Path, how: Thoroughness) -> list[str]:
    """manifest.verify, with the files shared among the ranks; the same list on all of them."""
    problems = on_rank_0(lambda: verify(path, "quick"))
    if problems or how == "quick":
        return problems
    manifest = agreed(lambda: read_manifest(path))
    mine = sorted(manifest.files)[rank() :: world_size()]
    return sorted(problem for problems in over_ranks(wrong_hashes(path, manifest, mine)) for problem in problems)


def read_checkpoint(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest, and the content of state.json, its hash checked; on every rank from rank 0."""

    def read() -> tuple[Manifest, dict[str, Any]]:
        manifest = read_manifest(folder)
        return manifest, read_state(folder, manifest)

    return on_rank_0(read)


def _model_differences(manifest: Manifest, parts: HasParameters) -> list[Difference]:
    model = states.merge(over_ranks(states.tensor_infos(states.model_tensors(parts))))
    return states.differences("model", manifest.tensors["model"], model)


def _optimizer_differences(manifest: Manifest, saved: dict[str, Any], optimizer: Optimizer, tensors: states.Tensors) -> list[Difference]:
    """Class, grouped parameters, and the tensors of the state."""
    mine = [name for group in optimizer.param_groups for name in group["names"]]
    given = {"class": saved["class"], **{name: "optimized" for group in saved["groups"] for name in group["names"]}}
    expected = {"class": type(optimizer).__name__, **{name: "optimized" for names in over_ranks(mine) for name in names}}
    infos = states.merge(over_ranks(states.tensor_infos(tensors)))
    return states.differences("optimizer", given, expected) + states.differences("optimizer", manifest.tensors["optimizer"], infos)


def _raise_differences(folder: Path, rows: list[Difference]) -> None:
    if rows:
        fix = "use the config the checkpoint was made with; for another optimizer or layout of training, start from checkpoint.load"
        raise CheckpointError(f"{folder} does not fit this run; nothing was loaded:\n{states.table(rows)}\n  fix: {fix}")


def _load_parameters(folder: Path, parts: HasParameters, names: Iterable[str]) -> None:
    """Into the first holder on this rank, from there to a second one of a tied parameter."""
    targets = states.loading_targets(parts, names)
    load_tensors(folder / "model", {name: holders[0] for name, holders in targets.items()})
    for first, *copies in targets.values():
        for copy in copies:
            copy.copy_(first)


def _shapes(infos: dict[str, TensorInfo]) -> dict[str, str]:
    return {name: f"shape {list(info.shape)}" for name, info in infos.items()}
