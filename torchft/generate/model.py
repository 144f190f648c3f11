"""Opens a model to talk to: weights, tokenizer and the chat template it was trained with.

    HF folder or hub id ------------------------------> itself, its copy here
    RUN/checkpoints/step_N ---------------------------> its weights; tokenizer and template as in RUN/config.yaml
    RUN -- export/step_N or a newer checkpoint -------> one of the above

The template is the same object as in training, so a prompt's ids are those that the training sample began with.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from torchft.checkpoint.folder import CheckpointFolder
from torchft.checkpoint.hf import copy_weights
from torchft.checkpoint.hub import local_folder
from torchft.checkpoint.manifest import MANIFEST
from torchft.checkpoint.source import open_source, recorded_base, run_config, run_tokenizer
from torchft.data.templates import Template, Thinking, build_template
from torchft.dtypes import DTYPES
from torchft.errors import CheckpointError
from torchft.log import get_logger
from torchft.models.decoder import Decoder, build_decoder
from torchft.tokenizers.load import load_tokenizer
from torchft.tokenizers.protocol import Tokenizer

log = get_logger(__name__)

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class LanguageModel:
    """A decoder with what turns text into its tokens and back. template: None if none was asked for."""

    path: Path
    decoder: Decoder
    tokenizer: Tokenizer
    template: Template | None

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a reply, or a text."""
        return self.template.stop_ids if self.template is not None else self.tokenizer.stop_ids


def open_model(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
    tokenizer: str | None = None,
    template: str | None = "auto",
    thinking: Thinking = "mixed",
) -> LanguageModel:
    """The model in a HF folder, a run folder or a checkpoint.

    precision auto: bf16 on CUDA, fp32 elsewhere. tokenizer: another folder to take it from. template, thinking: as in the recipes'
    section tokenizer, "auto" and "mixed" being the model's own; template None: raw text. Raises ConfigError, CheckpointError or DataError.
    """
    found = find_model(Path(path))
    source = open_source(found)  # quick: the weights are read below
    device = torch.device(device)
    dtype = DTYPES["bf16" if device.type == "cuda" else "fp32"] if precision == "auto" else DTYPES[precision]
    decoder = build_decoder(source.spec, device=device, dtype=dtype)
    report = copy_weights(decoder.named_parameters(), source.tensors)
    log.info("%s: %d tensors in %s on %s", found, report.num_tensors, str(dtype).removeprefix("torch."), device)
    text = load_tokenizer(local_folder(tokenizer)) if tokenizer else _own_tokenizer(found)
    if template == "auto" and is_checkpoint(found):
        template = _of_run(found, "tokenizer.template") or "auto"
        thinking = _of_run(found, "tokenizer.thinking") or thinking if thinking == "mixed" else thinking
    chat = None if template is None else build_template(template, text, thinking=thinking)
    return LanguageModel(found, decoder.eval(), text, chat)


def find_model(path: Path) -> Path:
    """A HF folder or a checkpoint: `path` itself, or of a run folder its export, or its newest checkpoint if that is newer; or what was
    downloaded of a hub id."""
    path = local_folder(path)
    if is_checkpoint(path) or not (path / "config.yaml").is_file():
        return path
    exports = [p for p in (path / "export").glob("step_*") if (p / "config.json").is_file()]
    newest = max(exports, key=_step_and_try, default=None)
    latest = next(iter(CheckpointFolder(path / "checkpoints").list_steps()), None)
    if newest is None and latest is None:
        raise CheckpointError(
            f"{path}: this run has no export/step_* and no checkpoint yet\n  fix: wait for its first save, or train it on"
        )
    if newest is None or (latest is not None and _step_and_try(latest)[0] > _step_and_try(newest)[0]):
        return latest
    return newest


def is_checkpoint(path: Path) -> bool:
    """True for RUN/checkpoints/step_N."""
    return (path / MANIFEST).is_file()


def _step_and_try(path: Path) -> tuple[int, int]:
    """(8, 2) of step_00000008-2, the second export of step 8."""
    step, _, again = path.name.removeprefix("step_").partition("-")
    return int(re.sub(r"\D", "", step) or 0), int(re.sub(r"\D", "", again) or 1)


def _own_tokenizer(found: Path) -> Tokenizer:
    if not is_checkpoint(found):
        return load_tokenizer(found)
    folder = _of_run(found, "tokenizer.path") or recorded_base(found, {})
    return run_tokenizer(run_config(found), Path(local_folder(folder)))


def _of_run(checkpoint: Path, key: str) -> Any:
    """A key of the config of the run that a checkpoint is of."""
    section, _, name = key.partition(".")
    return (run_config(checkpoint).get(section) or {}).get(name)
