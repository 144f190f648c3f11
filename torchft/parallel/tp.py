"""Tensor parallelism by declaration (Megatron-LM, Shoeybi et al. 2019; sequence parallelism, Korthikanti et al. 2022).

A plan says column or row by glob; every linear-like class says in TP_DIMS along which dimension each parameter is cut when it is a
column or a row. Between blocks the stream is a plain local tensor: this rank's tokens with sequence parallelism, all without.

    stream (b, t/tp, d) --norm--> --gather--> (b, t, d) --column--> heads/tp ... --row--> partial sums --reduce-scatter--> stream

Parameters become DTensors, so FSDP2, checkpoints and adapters need to know nothing of this file.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from torchft.batch import VocabShard
from torchft.errors import ConfigError, Problem
from torchft.models.decoder import Decoder
from torchft.quant.linear import QuantLinear

Role = Literal["column", "row", "norm", "added_norm", "head_norm", "gather", "core", "embedding", "positions"]
Plan = tuple[tuple[str, Role], ...]

PLAN: Plan = (
    ("embed_tokens", "embedding"),
    ("embed_positions", "positions"),
    ("layers.*.input_layernorm", "norm"),
    ("layers.*.self_attn", "gather"),
    ("layers.*.self_attn.q_proj", "column"),
    ("layers.*.self_attn.[qk]_norm", "head_norm"),
    ("layers.*.self_attn.core", "core"),
    ("layers.*.self_attn.o_proj", "row"),
    ("layers.*.mlp", "gather"),
    ("layers.*.mlp.gate_proj", "column"),
    ("layers.*.mlp.up_proj", "column"),
    ("layers.*.mlp.down_proj", "row"),
)

KV_SHARDED: Plan = (("layers.*.self_attn.[kv]_proj", "column"),)

NORMS: dict[str, Plan] = {  # by ModelSpec.block, whose norms of one name stand in different places
    "pre": (("layers.*.post_attention_layernorm", "norm"),),
    "sandwich": (
        ("layers.*.post_attention_layernorm", "added_norm"),
        ("layers.*.pre_feedforward_layernorm", "norm"),
        ("layers.*.post_feedforward_layernorm", "added_norm"),
    ),
}

LINEAR_DIMS = {"weight": (0, 1), "bias": (0, None)}  # {parameter: (dim cut in a column, dim cut in a row)}; None: whole on each rank
ROLE_INDEX = {"column": 0, "core": 0, "embedding": 0, "row": 1}


def apply_tp(model: Decoder, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Shards one stage over the tp axis, in place; parameters may be on meta. Trainability is kept."""
    stream: Placement = Shard(1) if sequence_parallel else Replicate()
    kv_heads = model.spec.attention.num_kv_heads
    plan = PLAN + NORMS[model.spec.block] + (KV_SHARDED if kv_heads % mesh.size() == 0 else ())
    for name, module in list(model.named_modules()):
        for pattern, role in plan:
            if fnmatchcase(name, pattern) and name.count(".") == pattern.count("."):
                check_cut(name, module, mesh.size(), ROLE_INDEX.get(role))
                _distribute(module, mesh, role, stream)
    if kv_heads % mesh.size():
        for block in model.layers.values():
            _share_kv(block.self_attn.k_proj, mesh, kv_heads)
            _share_kv(block.self_attn.v_proj, mesh, kv_heads)
    if not model.last:
        return
    _distribute(model.norm, mesh, "norm", stream)
    model.norm.register_forward_hook(lambda module, args, out: _whole_hidden(out))
    rows = -(-model.spec.vocab_size // mesh.size())  # the last rank's may be fewer
    model.lm_head.vocab = VocabShard(mesh.get_local_rank() * rows, model.spec.num_tokens, mesh.get_group(), rows)
    if model.lm_head.weight is not None:
        _partition(model.lm_head, mesh, 0)


def check_cut(name: str, module: nn.Module, tp: int, index: int | None) -> None:
    """Raises ConfigError if a quantised layer would be cut through a block of its weights."""
    for parameter, dim in _dims(module, index).items():
        if isinstance(module, QuantLinear) and dim is not None and getattr(module, parameter).shape[dim] % tp:
            given, size = f"{tp} cuts the {parameter} of {name}", getattr(module, parameter).shape[dim]
            fix = "use a smaller quant.block_size or parallel.tp, or add the layer to quant.exclude"
            raise ConfigError(Problem("parallel.tp", given, f"a divisor of its {size} blocks", fix))


def _distribute(module: nn.Module, mesh: DeviceMesh, role: Role, stream: Placement) -> None:
    """Cuts the module's own parameters and translates between the plain stream and DTensors at its border."""
    _partition(module, mesh, ROLE_INDEX.get(role))
    inputs, outputs = _BORDERS[role](mesh, stream)
    if inputs:
        module.register_forward_pre_hook(lambda module, args: (inputs(args[0]), *args[1:]))
    if outputs:
        module.register_forward_hook(lambda module, args, out: outputs(out))


def _partition(module: nn.Module, mesh: DeviceMesh, index: int | None) -> None:
    """index: 0 column, 1 row, None whole."""
    dims = _dims(module, index)
    for name, parameter in list(module.named_parameters(recurse=False)):
        dim = dims[name]
        placement = Replicate() if dim is None else Shard(dim)
        sharded = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def _share_kv(projection: nn.Module, mesh: DeviceMesh, num_kv_heads: int) -> None:
    """Fewer kv heads than ranks: each rank makes all of them (the weights are whole) and goes on with the one its queries attend by.

    A head's gradient is a sum over the ranks that share it, so that of the output, and of the weight, is a part.
    """
    _partition(projection, mesh, None)
    head, part = mesh.get_local_rank() * num_kv_heads // mesh.size(), [Partial()]

    def own(module: nn.Module, args: tuple, y: DTensor) -> Tensor:
        return y.to_local(grad_placements=part).chunk(num_kv_heads, dim=-1)[head]  # (b, t, head_dim)

    projection.register_forward_hook(own)


def _dims(module: nn.Module, index: int | None) -> dict[str, int | None]:
    """The dimension along which each of the module's own parameters is cut; None: held whole."""
    dims = dict(LINEAR_DIMS)
    for cls in reversed(type(module).__mro__):
        dims |= vars(cls).get("TP_DIMS", {})
    return {name: None if index is None else dims[name][index] for name, _ in module.named_parameters(recurse=False)}


def _norm(mesh: DeviceMesh, stream: Placement):
    return lambda x: _as_dtensor(x, mesh, stream), None


def _added_norm(mesh: DeviceMesh, stream: Placement):
    return lambda x: _as_dtensor(x, mesh, stream), lambda y: y.to_local()


def _core(mesh: DeviceMesh, stream: Placement):
    return None, None  # plain local heads in and out


def _head_norm(mesh: DeviceMesh, stream: Placement):
    # (b, t, local heads, head_dim): one weight for all heads, whose gradient is a sum over the ranks' heads
    return lambda x: _as_dtensor(x, mesh, Shard(2)), lambda y: y.to_local()


def _gather(mesh: DeviceMesh, stream: Placement):
    return lambda x: x.redistribute(placements=[Replicate()]), None


def _column(mesh: DeviceMesh, stream: Placement):
    return None, lambda y: y.to_local()


def _row(mesh: DeviceMesh, stream: Placement):
    return lambda x: _as_dtensor(x, mesh, Shard(-1)), lambda y: y.redistribute(placements=[stream]).to_local()


def _embedding(mesh: DeviceMesh, stream: Placement):
    # never async_op=True here: a compiled block that is handed the pending result loses the embedding's gradient, silently
    return lambda x: _as_dtensor(x, mesh, Replicate()), lambda y: y.redistribute(placements=[stream]).to_local()


_BORDERS: dict[Role, Callable] = {
    "norm": _norm,
    "added_norm": _added_norm,
    "head_norm": _head_norm,
    "core": _core,
    "gather": _gather,
    "column": _column,
    "row": _row,
    "embedding": _embedding,
    "positions": _embedding,  # held whole, and so is its output before it is cut to the stream
}


def _as_dtensor(x: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    return DTensor.from_local(x, mesh, [placement], run_check=False)


def _whole_hidden(out: DTensor) -> Tensor:
    """All tokens for the heads, as a plain tensor (b, t, d); each rank's vocabulary gives a part of its gradient."""
    return out.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
