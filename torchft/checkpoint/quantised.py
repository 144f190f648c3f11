"""HF folders whose linear layers are stored packed (GPTQ, AWQ), streamed into frozen layers as they are.

    X.qweight, X.qzeros, X.scales, X.g_idx --> the layer of our X        all other weights: as from any HF folder (hf.py)

A layer keeps the stored numbers; nothing is dequantised and quantised again. Every tensor of the folder is used exactly once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchft.checkpoint.hf import LoadReport, Weights, copy_weights, open_weights, weight_shapes, weights_of
from torchft.checkpoint.new_rows import NewRows
from torchft.checkpoint.tensor_files import LazyTensor, open_tensors
from torchft.dist import agreed
from torchft.errors import CheckpointError
from torchft.models.build import FAMILIES, read_config
from torchft.models.decoder import build_decoder
from torchft.models.keys import map_from_hf
from torchft.models.spec import ModelSpec
from torchft.quant.grouped import Grouped, GroupedLinear
from torchft.quant.stored import PER_WORD, TENSORS, StoredFormat, stored_format, unpack_columns, unpack_rows
from torchft.quant.swap import QuantConfig, apply_quant, quantised_modules, swap


@dataclass(frozen=True)
class PackedLayer:
    """The tensors of one packed weight, not read yet."""

    shape: tuple[int, int]  # of the weight
    tensors: dict[str, LazyTensor]  # qweight, qzeros, scales, g_idx
    stored: StoredFormat

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def read(self) -> Grouped:
        """Scales, zero points and groups whole; codes later, row by row."""
        width = self.shape[1]
        zeros = unpack_columns(self.tensors["qzeros"].read(()), self.stored.method)
        shifted = (zeros + self.stored.zero_shift) & 15
        groups = torch.arange(width, dtype=torch.int32) // self.stored.groups(width)
        if "g_idx" in self.tensors:
            groups = self.tensors["g_idx"].read(()).to(torch.int32)
        scales = self.tensors["scales"].read(()).float().t().contiguous()
        if not 0 <= int(groups.min()) <= int(groups.max()) < scales.shape[1]:
            raise CheckpointError(f"g_idx names groups outside 0 to {scales.shape[1] - 1}\n  fix: take the file again")
        return Grouped(self._rows, scales, shifted.t().contiguous(), groups)

    def _rows(self, lo: int, hi: int) -> Tensor:
        """Rows lo to hi of the codes, (hi - lo, in)."""
        words = self.tensors["qweight"]
        if self.stored.method == "gptq":
            return unpack_rows(words.read((slice(None), slice(lo, hi)))).t()
        first, last = lo // PER_WORD, -(-hi // PER_WORD)
        codes = unpack_columns(words.read((slice(None), slice(first, last))), "awq").t()
        return codes[lo - first * PER_WORD : hi - first * PER_WORD]


def read_stored(folder: Path | str, spec: ModelSpec, config: Mapping[str, Any]) -> StoredFormat | None:
    """How the folder's weights are packed, and which; None if they are plain. config: its config.json."""
    stored = stored_format(config, where=str(Path(folder) / "config.json"))
    return stored and replace(stored, layers=frozenset(open_packed(folder, spec, stored)[1]))


def open_packed(folder: Path | str, spec: ModelSpec, stored: StoredFormat) -> tuple[Weights, dict[str, PackedLayer]]:
    """The folder's plain weights and its packed layers, by our names, checked against the spec; nothing is read yet."""
    folder = Path(folder)
    files, shapes = open_tensors(folder, packed=True), weight_shapes(spec)
    bases = [name.removesuffix(".qweight") for name in files if name.endswith(".qweight")]
    if not bases:
        raise CheckpointError(f"{folder} holds no *.qweight, but config.json says it is {stored.method}\n  fix: take it again")
    keys = map_from_hf(FAMILIES[spec.family].KEYS, [f"{base}.weight" for base in bases], shapes, where=str(folder))
    layers = {}
    for ours, at in keys.stored.items():
        if at.transposed or len(at.members) > 1 or not ours.startswith("layers."):
            raise CheckpointError(
                f"{folder}: {at.name} is packed\n  expected: packed linear layers of blocks, each with its own tensor\n"
                "  fix: take the unquantised checkpoint and set quant.format=nf4"
            )
        base = at.name.removesuffix(".weight")
        found = {part: files.pop(f"{base}.{part}") for part in TENSORS[stored.method] if f"{base}.{part}" in files}
        layers[ours] = PackedLayer(shapes[ours], found, stored)
        _check(layers[ours], base, folder)
    rest = {name: shape for name, shape in shapes.items() if name not in layers}
    return weights_of(files, rest, spec, folder), layers


def load_packed(
    folder: Path | str, spec: ModelSpec, parameters: Iterable[tuple[str, Tensor]], layers: Mapping[str, GroupedLinear], stored: StoredFormat
) -> LoadReport:
    """Fills this rank's packed layers (by the name of their weight) and all other `parameters`. As load_hf otherwise."""
    weights, packed = agreed(lambda: open_packed(folder, spec, stored))
    plain = agreed(lambda: copy_weights([(n, p) for n, p in parameters if n in weights.tensors], weights.tensors))

    def fill() -> int:
        for name, layer in layers.items():
            layer.fill_grouped(packed[name].read())
        return sum(packed[name].num_bytes for name in layers)

    num_bytes = agreed(fill)
    return LoadReport(plain.num_tensors + len(layers), plain.num_bytes + num_bytes, plain.dtypes | {"int4": len(layers)})


def open_base(
    folder: Path | str, spec: ModelSpec, *, new_rows: NewRows | None = None, quant: QuantConfig | None = None
) -> dict[str, LazyTensor]:
    """A base's weights as a run with this `quant` computed with them: packed or quantised ones dequantised, when they are read."""
    stored = stored_format(read_config(folder, packed=True)[1], where=str(folder))
    if stored is not None:
        weights, packed = open_packed(folder, spec, stored)
        return weights.tensors | {name: _dequantised_packed(layer) for name, layer in packed.items()}
    tensors = open_weights(folder, spec, new_rows=new_rows).tensors
    return dequantised(tensors, spec, quant) if quant else tensors


def dequantised(tensors: Mapping[str, LazyTensor], spec: ModelSpec, quant: QuantConfig) -> dict[str, LazyTensor]:
    """A base's weights with the selected ones quantised and dequantised again, when they are read; a packed format changes nothing."""
    if quant.format is None or quant.format in TENSORS:
        return dict(tensors)
    layers = build_decoder(spec)
    apply_quant([layers], quant)
    return dict(tensors) | {name: _dequantised(tensors[name], quant) for name in quantised_modules([layers])}


def _dequantised(source: LazyTensor, quant: QuantConfig) -> LazyTensor:
    def read(part: tuple[slice, ...]) -> Tensor:
        layer = nn.Linear(source.shape[1], source.shape[0], bias=False, device="meta", dtype=source.dtype)
        swap(layer, quant)
        layer.to_empty(device="cpu")
        layer.fill(lambda lo, hi: source.read((slice(lo, hi), slice(None))))
        return layer.weight[part]

    return LazyTensor(source.shape, source.dtype, read, by_parts=False)


def _dequantised_packed(packed: PackedLayer) -> LazyTensor:
    dtype = packed.tensors["scales"].dtype

    def read(part: tuple[slice, ...]) -> Tensor:
        layer = nn.Linear(packed.shape[1], packed.shape[0], bias=False, device="meta", dtype=dtype)
        swap(layer, QuantConfig(format=packed.stored.method), packed.stored)
        layer.to_empty(device="cpu")
        layer.fill_grouped(packed.read())
        return layer.weight[part]

    return LazyTensor(packed.shape, dtype, read, by_parts=False)


def _check(layer: PackedLayer, base: str, folder: Path) -> None:
    """Raises CheckpointError naming the tensors that are absent, or of another shape than the weight's."""
    (out, width), group = layer.shape, layer.stored.groups(layer.shape[1])
    num_groups = -(-width // group)
    gptq = layer.stored.method == "gptq"
    expected = {
        "qweight": (width // PER_WORD, out) if gptq else (width, out // PER_WORD),
        "qzeros": (num_groups, out // PER_WORD),
        "scales": (num_groups, out),
        "g_idx": (width,),
    }
    given = {part: layer.tensors[part].shape if part in layer.tensors else "absent" for part in TENSORS[layer.stored.method]}
    wrong = [
        f"  {base}.{p}: {given[p]}, expected {expected[p]}"
        for p in given
        if given[p] != expected[p] and (p, given[p]) != ("g_idx", "absent")
    ]
    if wrong:
        raise CheckpointError("\n".join([f"{folder}: packed weights that don't fit config.json", *wrong, "  fix: take both of one model"]))
