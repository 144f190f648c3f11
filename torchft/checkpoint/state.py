"""Model and optimizer as flat tensors by global name, and back: what a checkpoint holds, and whether it fits this run.

    model/       <global name>             trainable parameters, each once (the second holder of a tied one only loads)
    optimizer/   <global name>.<state>     every tensor of the optimizer's state, `step` scalars included
    state.json   "optimizer"               class, groups with their options, values that are no tensors, parameters without state

Works for plain tensors and DTensors on any mesh, with different names on different ranks (pipeline stages). Nothing is loaded before
names, shapes and dtypes were compared in both directions.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from torchft.checkpoint.manifest import TensorInfo, encode_json
from torchft.errors import CheckpointError

T = TypeVar("T")
Tensors = Mapping[str, Tensor]
Difference = tuple[str, str, str]  # key, given by the checkpoint, expected by this run

_IMPLEMENTATION = ("params", "names", "fused", "foreach", "capturable")  # of a param_group: how, not what


class HasParameters(Protocol):
    """What a checkpoint needs to know of the model: `torchft.parallel.parts.Parts` has it."""

    trainable: frozenset[str]  # global names over all ranks

    def named_parameters(self, *, copies: bool = False) -> Iterator[tuple[str, Parameter]]:
        """This rank's parameters by global name; with `copies` also the second holder of a tied one."""
        ...


def tensor_infos(tensors: Tensors) -> dict[str, TensorInfo]:
    """Global shape and dtype by key."""
    return {key: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in tensors.items()}


def merge(dicts: Iterable[Mapping[str, T]]) -> dict[str, T]:
    """One dict with the keys of all, sorted."""
    merged = {key: value for each in dicts for key, value in each.items()}
    return dict(sorted(merged.items()))


def model_tensors(parts: HasParameters, *, frozen: bool = False) -> dict[str, Tensor]:
    """This rank's parameters, detached, by global name: the trainable ones, with `frozen` all."""
    return {name: param.detach() for name, param in parts.named_parameters() if frozen or name in parts.trainable}


def loading_targets(parts: HasParameters, names: Iterable[str]) -> dict[str, list[Tensor]]:
    """Where the named parameters go on this rank: name -> its holders, more than one if a rank holds a tied one twice."""
    wanted, targets = set(names), {}
    for name, param in parts.named_parameters(copies=True):
        if name in wanted:
            targets.setdefault(name, []).append(param.detach())
    return targets


def names_hash(names: Iterable[str]) -> str:
    """SHA-256 over a set of names."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def optimizer_tensors(optimizer: Optimizer, without: Iterable[str] = ()) -> dict[str, Tensor]:
    """The tensors of the optimizer's state on this rank: `<global name>.<state>`; not those of the parameters in `without`.

    Raises CheckpointError for state of no parameter, which would be lost.
    """
    holders, without = _holders(optimizer), set(without)
    if set(optimizer.state) - {param for params in holders.values() for param in params}:
        raise CheckpointError(f"{type(optimizer).__name__} keeps state that belongs to no parameter of its groups: it can't be saved")
    states = {name: optimizer.state.get(params[0], {}) for name, params in holders.items() if name not in without}
    split = getattr(optimizer, "split_state", lambda key, value: {key: value})  # quantised state names its plain tensors
    return {
        f"{name}.{part}": tensor
        for name, state in states.items()
        for key, value in state.items()
        if torch.is_tensor(value)
        for part, tensor in split(key, value).items()
    }


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Each param_group's options as JSON values (betas, lr, eps, ...), without its parameters."""
    return [{key: _plain(key, value) for key, value in group.items() if key not in _IMPLEMENTATION} for group in optimizer.param_groups]


def describe_optimizer(optimizer: Optimizer, initial: list[dict[str, Any]]) -> dict[str, Any]:
    """This rank's part of state.json's "optimizer". `initial`: the options the run started with, to tell config from state."""
    groups = [
        {"names": sorted(group["names"]), "options": options, "initial": first}
        for group, options, first in zip(optimizer.param_groups, group_options(optimizer), initial, strict=True)
    ]
    states = {name: optimizer.state.get(params[0], {}) for name, params in _holders(optimizer).items()}
    values = {
        name: {key: _plain(key, value) for key, value in state.items() if not torch.is_tensor(value)} for name, state in states.items()
    }
    return {
        "class": type(optimizer).__name__,
        "groups": groups,
        "values": {name: value for name, value in values.items() if value},
        "stateless": sorted(name for name, state in states.items() if not state),
    }


def merge_descriptions(descriptions: list[dict[str, Any]]) -> dict[str, Any]:
    """One description from those of all ranks: groups with equal options become one."""
    groups: dict[bytes, dict[str, Any]] = {}
    for group in (group for description in descriptions for group in description["groups"]):
        key = encode_json([group["options"], group["initial"]])
        known = groups.setdefault(key, {**group, "names": []})
        known["names"] = sorted({*known["names"], *group["names"]})
    return {
        "class": descriptions[0]["class"],
        "groups": list(groups.values()),
        "values": merge(description["values"] for description in descriptions),
        "stateless": sorted({name for description in descriptions for name in description["stateless"]}),
    }


def materialise(optimizer: Optimizer) -> list[Parameter]:
    """Makes the optimizer allocate its state, whatever its class, leaving parameters, gradients and options exactly as they were.

    Each parameter without state takes one step with a gradient of zeros and is then restored, one at a time: the extra memory is two
    copies of the largest. The values in the new state mean nothing: load over them, or `forget` them. Returns these parameters.
    """
    params = [param for _, param in _named(optimizer)]
    fresh = [param for param in params if not optimizer.state.get(param)]
    gradients = [param.grad for param in params]
    options = [{key: value if key == "params" else deepcopy(value) for key, value in group.items()} for group in optimizer.param_groups]
    for param in params:
        param.grad = None
    for param in fresh:
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        optimizer.step()
        param.grad = None
        with torch.no_grad():
            param.copy_(before)
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient
    for group, saved in zip(optimizer.param_groups, options, strict=True):
        group.clear()
        group.update(saved)
    return fresh


def forget(optimizer: Optimizer, params: Iterable[Parameter]) -> None:
    """Drops the state of some parameters, as before their first step."""
    for param in params:
        optimizer.state.pop(param, None)


def restore_options(optimizer: Optimizer, saved: Mapping[str, Any]) -> list[Difference]:
    """Ends a restore, after the tensors were loaded: options and values that are no tensors, from state.json's "optimizer".

    An option that moved during the saved run (lr under a schedule, counters of schedule-free optimizers) is state: it is restored. One that
    didn't is configuration: this run's value stays, and a difference is returned. Parameters saved without state are left without.
    """
    by_name = {name: group for group in saved["groups"] for name in group["names"]}
    changed = []
    for group in optimizer.param_groups:
        for source in {id(by_name[name]): by_name[name] for name in group["names"]}.values():
            for key, value in source["options"].items():
                if key not in source["initial"] or source["initial"][key] != value:
                    group[key] = _like(group.get(key), value)
                elif _plain(key, group.get(key)) != value:
                    changed.append((f"optimizer option {key}", str(value), str(group.get(key))))
    stateless = set(saved["stateless"])
    for name, (first, *copies) in _holders(optimizer).items():
        if name in stateless:
            forget(optimizer, (first, *copies))
            continue
        optimizer.state[first].update(saved["values"].get(name, {}))
        for copy in copies:
            optimizer.state[copy] = {
                key: value.clone() if torch.is_tensor(value) else value for key, value in optimizer.state[first].items()
            }
    return list(dict.fromkeys(changed))


def differences(what: str, given: Mapping[str, T], expected: Mapping[str, T]) -> list[Difference]:
    """Keys on one side only, and keys whose values differ."""
    keys = sorted(given.keys() | expected.keys())
    rows = [(f"{what} {key}", str(given.get(key, "missing")), str(expected.get(key, "not there"))) for key in keys]
    return [row for key, row in zip(keys, rows, strict=True) if key not in given or key not in expected or given[key] != expected[key]]


def table(rows: list[Difference], limit: int = 20) -> str:
    """Differences as a table: key, given (checkpoint), expected (this run)."""
    shown = [("key", "given (checkpoint)", "expected (this run)"), *rows[:limit]]
    widths = [max(len(row[i]) for row in shown) for i in range(2)]
    lines = [f"  {key:{widths[0]}}  {given:{widths[1]}}  {expected}" for key, given, expected in shown]
    return "\n".join(lines + ([f"  and {len(rows) - limit} more"] if len(rows) > limit else []))


def _named(optimizer: Optimizer) -> Iterator[tuple[str, Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def _holders(optimizer: Optimizer) -> dict[str, list[Parameter]]:
    """Name -> its parameters on this rank: two if both stages that hold a tied one are here."""
    holders: dict[str, list[Parameter]] = {}
    for name, param in _named(optimizer):
        holders.setdefault(name, []).append(param)
    return holders


def _plain(key: str, value: Any) -> Any:
    """A JSON value: numbers as they are, one-element tensors as numbers, tuples as lists."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if torch.is_tensor(value) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(key, item) for name, item in value.items()}
    raise CheckpointError(f"optimizer value {key!r} is a {type(value).__name__}: a checkpoint holds tensors and plain values only")


def _like(current: Any, value: Any) -> Any:
    """The saved value in the current one's type: JSON knows neither tuples nor tensors."""
    if torch.is_tensor(current):
        return current.fill_(value)
    return tuple(value) if isinstance(current, tuple) else value
