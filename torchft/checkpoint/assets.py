"""What a HF folder holds beside the weights: config.json, generation_config.json, the tokenizer's files and the chat template.

They travel from the source to every export, so that the exported folder is complete: transformers, a server or this library opens it
without the original, with the same token ids and the same template as in training.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from torchft.checkpoint.manifest import write_durably
from torchft.checkpoint.safe_path import file_in
from torchft.errors import CheckpointError
from torchft.models.build import FAMILIES
from torchft.models.hf_config import read_json
from torchft.models.spec import ModelSpec
from torchft.tokenizers.load import load_tokenizer, tokenizer_files_in
from torchft.tokenizers.rank_files import is_rank_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.json", "merges.txt", "chat_template.jinja")
TOKENIZER_BYTES = 256 << 20  # the largest tokenizer file that is taken along
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Assets:
    """config: the source's config.json, of which the token ids are carried over; the model's own keys come from the spec."""

    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)  # generation_config.json
    files: dict[str, bytes] = field(default_factory=dict)  # the tokenizer's files by name

    def with_template(self, template: str, stop_ids: Iterable[int] = ()) -> "Assets":
        """The same with this Jinja chat template: in a file of its own and, for older readers, in tokenizer_config.json. `stop_ids`: the
        tokens that end its replies, for generation_config.json."""
        settings = json.loads(self.files.get("tokenizer_config.json", b"{}")) | {"chat_template": template}
        new = {"chat_template.jinja": template.encode(), "tokenizer_config.json": _dump(settings)}
        ends = {"eos_token_id": sorted(stop_ids)} if stop_ids else {}
        return replace(self, files=self.files | new, generation=self.generation | ends)


def read_assets(folder: Path | str) -> Assets:
    """The assets of a HF folder; what is absent stays empty. Raises ConfigError for broken JSON, CheckpointError for odd files."""
    folder = Path(folder)
    present = [p for name in TOKENIZER_FILES if (p := file_in(folder, name, source=str(folder))).is_file()]
    for path in present:
        if path.stat().st_size > TOKENIZER_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes\n  expected: at most {TOKENIZER_BYTES}\n  fix: take the file again"
            )
    files = {path.name: path.read_bytes() for path in present}
    if "tokenizer.json" not in files and any(is_rank_file(path) for path in tokenizer_files_in(folder)):
        files = load_tokenizer(folder).to_files()  # ranks as tokenizer.json, which others read too
    settings = {name: folder / name for name in ("config.json", "generation_config.json")}
    config, generation = (read_json(path) if path.is_file() else {} for path in settings.values())
    return Assets(config, generation, files)


def write_assets(folder: Path, spec: ModelSpec, assets: Assets, dtype: torch.dtype) -> None:
    """Writes everything but the weights. dtype: the weights' (`torch_dtype` in config.json)."""
    ids = {key: assets.config[key] for key in TOKEN_IDS if key in assets.config}
    config = FAMILIES[spec.family].to_hf(spec) | ids | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_durably(folder / "config.json", _dump(config))
    known = {key: value for key, value in ids.items() if value is not None}
    write_durably(folder / "generation_config.json", _dump(known | assets.generation))
    for name, content in assets.files.items():
        write_durably(folder / name, content)


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
