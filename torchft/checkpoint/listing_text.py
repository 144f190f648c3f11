"""The texts of `torchft ckpt`: what listing.py found, as tables for a terminal."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchft.checkpoint.listing import Listed

MAX_CHARS = 48  # of a value in a table of differences
MAX_ROWS = 40


def as_dict(one: Listed) -> dict[str, Any]:
    """As JSON values."""
    facts = {"step": one.step, "path": str(one.path), "bytes": one.num_bytes, "pointers": one.pointers, "problems": one.problems}
    if one.manifest is None:
        return facts
    m = one.manifest
    return facts | {"tokens": m.tokens, "world_size": m.world_size, "mesh": m.mesh, "parent": m.parent, "versions": m.versions}


def list_text(listed: Sequence[Listed], aside: Sequence[Path], unfinished: Sequence[Path]) -> str:
    """A row a checkpoint, then what lies beside them."""
    rows = [("step", "size", "tokens", "ranks", "", "state")]
    rows += [(str(c.step), size_text(c.num_bytes), *_counts(c), ", ".join(c.pointers), c.state) for c in listed]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join([*(f"{cell:>{width}}" for cell, width in zip(row[:4], widths)), f"{row[4]:<{widths[4]}}", row[5]]) for row in rows]
    lines += [f"set aside: {path.name}" for path in aside] + [f"unfinished: {path.name}" for path in unfinished]
    return "\n".join(line.rstrip() for line in lines)


def show_text(data: Mapping[str, Any], *, tensors: bool = False) -> str:
    """What `describe` gives, in lines; with `tensors` each of them as well."""
    state = data["state"]
    optimizer, base, loader = state.get("optimizer", {}), state.get("base"), state.get("loader", {})
    lines = [("checkpoint", str(data["path"])), ("step", f"{data['step']:,}"), ("tokens", f"{data['tokens']:,}")]
    axes = ", ".join(f"{axis} {degree}" for axis, degree in data["mesh"].items() if degree > 1)
    lines += [("ranks", f"{data['world_size']}" + (f" ({axes})" if axes else "")), ("parent", data["parent"] or "none")]
    lines += [("versions", ", ".join(f"{name} {version}" for name, version in data["versions"].items()))]
    for part, infos in data["tensors"].items():
        size = sum(info["size"] for name, info in data["files"].items() if name.startswith(f"{part}/"))
        kinds = Counter(info.split()[0] for info in infos.values())
        lines += [(part, f"{len(infos)} tensors ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}), {size_text(size)}")]
    lines += [("optimizer", "not saved" if state.get("model_only") else optimizer.get("class", "?"))]
    for index, group in enumerate(optimizer.get("groups", [])):
        shown = ", ".join(f"{key}={value}" for key, value in group["options"].items() if value is not None)
        lines += [(f"  group {index}", f"{len(group['names'])} parameters: {shown}")]
    lines += [(key, _flat(state[key])) for key in ("schedule", "counters", "early_stop", "scaler") if state.get(key)]
    lines += [("loader", _flat({key: value for key, value in loader.items() if not isinstance(value, list | dict)}))] if loader else []
    lines += [("frozen base", f"{base['path']}, SHA-256 {base['sha256'][:12]}...")] if base else []
    if tensors:
        lines += [(f"{part}/{name}", info) for part, infos in data["tensors"].items() for name, info in infos.items()]
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {text}" for key, text in lines)


def diff_text(a: Path, b: Path, found: Mapping[str, list[str]], values: Mapping[str, tuple[float, float]] | None) -> str:
    """The differences as a table; long values cut, the files' hashes last."""
    from torchft.config.compare import Difference, differences_text

    rows = [Difference(key, *(_short(value) for value in pair)) for key, pair in found.items()]
    text = differences_text(rows[:MAX_ROWS], str(a), str(b))
    text += f"\nand {len(rows) - MAX_ROWS} more (--json has all)" if len(rows) > MAX_ROWS else ""
    if values is not None:
        text += f"\n{len(values)} tensors of the model differ" + (", max|b - a| and that over max|a|:" if values else "")
        text += "".join(f"\n  {error:.3e}  {relative:.3e}  {name}" for name, (error, relative) in list(values.items())[:MAX_ROWS])
    return text


def size_text(num_bytes: float) -> str:
    """In bytes, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def _counts(one: Listed) -> tuple[str, str]:
    return (f"{one.manifest.tokens:,}", str(one.manifest.world_size)) if one.manifest else ("?", "?")


def _flat(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _short(value: str) -> str:
    return value if len(value) <= MAX_CHARS else f"{value[: MAX_CHARS - 3]}..."
