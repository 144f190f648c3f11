"""The README.md of an exported model: where it comes from, how it was trained, what it came to, how to load it.

Written from the run's own files, for publishing: no secrets, no paths of the machine (of a path its last part stays), no host.
"""

from pathlib import Path
from typing import Any

import yaml

from torchft.checkpoint.hub import is_hub_id
from torchft.config.problems import leaves, redact_text
from torchft.metrics.page import setting, show
from torchft.train.record import RunRecord

SECTIONS = ("loss", "optim", "schedule", "train", "precision", "data", "adapter")  # whose changed values are hyper-parameters
BY_DATA = ("data.train.", "data.validation.", "data.cache")  # told apart: by name


def model_card(run: RunRecord, step: int, *, files: str = "safetensors") -> str:
    """Markdown with the front matter the hub reads. files: what the folder holds, "safetensors" or "gguf"."""
    base = (run.config.get("model") or {}).get("path") or ""
    front: dict[str, Any] = {"library_name": "transformers" if files == "safetensors" else "gguf", "tags": ["torchft"]}
    if is_public := is_hub_id(base):
        front["base_model"] = base.split("@")[0]
    model = run.facts.get("model", {})
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {_word(run.name)}, step {step}", ""]
    origin = base if is_public else (Path(base).name if base else "random weights")
    size = f" ({model['family']}, {model['parameters']:,} parameters, sequences of up to {model['seq_len']:,} tokens)" if model else ""
    lines += [f"Trained from **{_word(origin)}**{size} with torchft {run.facts.get('versions', {}).get('torchft', '')}.", ""]
    lines += ["## Data", "", *_data(run.facts.get("data", [])), "", "## Training", "", "| key | value |", "|---|---|"]
    lines += [f"| {_word(key)} | {_word(value)} |" for key, value in _settings(run)]
    lines += ["", "## Numbers", "", "| | |", "|---|---|", *(f"| {_word(k)} | {v} |" for k, v in _numbers(run, step)), "", "## Loading", ""]
    return "\n".join([*lines, *_loading(files), ""])


def _data(sources: list[dict[str, Any]]) -> list[str]:
    return [f"- {s['use']}: {_word(Path(s['name']).name)}, {s['kept']:,} samples, {s['trained']:,} trained tokens" for s in sources]


def _settings(run: RunRecord) -> list[tuple[str, str]]:
    """The hyper-parameters that were set, and those every reader asks for; no value that is a path."""
    flat = {".".join(path): value for path, value in leaves(run.config)}
    always = [key for key in ("optim.name", "optim.lr", "schedule.name", "train.global_batch_size", "data.seq_len") if key in flat]
    changed = [key for key in run.facts.get("changed", {}) if key.split(".")[0] in SECTIONS and not key.startswith(BY_DATA)]
    values = {key: flat.get(key, run.facts.get("changed", {}).get(key, [None])[0]) for key in dict.fromkeys(always + changed)}
    return [(key, setting(value)) for key, value in values.items() if not _is_path(value)]


def _numbers(run: RunRecord, step: int) -> list[tuple[str, str]]:
    """The last values at or before the step."""
    found: dict[str, str] = {"step": show(step)}
    for row in (row for row in run.rows if row["step"] <= step):
        wanted = {"loss": "training loss", "tokens_total": "tokens"} | {key: key for key in row if key.startswith("val/")}
        found |= {wanted[key]: show(value) for key, value in row.items() if key in wanted}
    return list(found.items())


def _loading(files: str) -> list[str]:
    if files == "gguf":
        return ["With Ollama: `ollama create NAME -f Modelfile`; with llama.cpp: `llama-cli --jinja -m FILE.gguf`."]
    code = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", 'folder = "."  # this folder, or its id on the hub']
    code += ["model = AutoModelForCausalLM.from_pretrained(folder)", "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    return ["```python", *code, "```"]


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value or value.startswith(("~", ".")))


def _word(text: object) -> str:
    """Text that can't break a line or a table, become HTML, or tell a secret."""
    flat = " ".join(redact_text(str(text)).split())
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
