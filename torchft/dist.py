"""Processes: who am I, how many are we, on which device, and how do we agree and stop. The only reader of environment variables.

One process without torchrun is world size 1 without a process group; every function here then is the identity. Randomness is
keyed (contract A8): `keyed_generator("init", seed, name, block)` gives the same numbers on every layout, and no RNG state is saved.

A branch that changes collectives is taken by all ranks or by none: `agree` for flags, `agreed` and `on_rank_0` for work that may fail.
"""

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from torchft.compat import default_store, keep_freed_memory
from torchft.errors import CheckpointError, ConfigError, Problem

T = TypeVar("T")
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
SECRET_NAME = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
WAIT_S = 1.0  # how often ranks that wait for rank 0 look whether it is through


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


def init_world(device: str = "auto", timeout_s: float = 600.0) -> World:
    """Joins the process group that torchrun announces (none: one process) and picks this process's device.

    device: "auto" (cuda if there is one, else cpu), "cpu" or "cuda". Raises ConfigError if cuda is asked for and missing.
    """
    rank, size, local_rank, local_size = _place()
    kind = _device_kind(device, local_size)
    where = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(where)
    elif not any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ):  # the user's own choice
        keep_freed_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        options = {"device_id": where} if kind == "cuda" else {"store": _attempt_store(rank, size, timeout_s)}
        dist.init_process_group(BACKENDS[kind], rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s), **options)
    return World(rank, size, local_rank, local_size, where)


def ensure_group(world: World, timeout_s: float = 600.0) -> None:
    """Gives a single process a group of its own: mixed precision needs a mesh, even of size 1."""
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(BACKENDS[world.device.type], store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _device_kind(device: str, local_size: int) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(Problem("device", device, "auto, cpu or cuda", "choose one of them"))
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not available):
        return "cpu"
    if available < local_size:
        raise ConfigError(
            Problem("device", device, f"{local_size} CUDA devices, one a process; found {available}", "use device=cpu or fewer processes")
        )
    return "cuda"


def _place() -> tuple[int, int, int, int]:
    """Rank, world size, local rank and local world size as the launcher says; half of it is an error, not a guess."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given:
        return 0, 1, 0, 1
    if len(given) < len(names):
        found = " ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(Problem("environment", found, f"all of {', '.join(names)}, or none", "start by torchrun, or unset them"))
    rank, size, local_rank = (int(given[name]) for name in names)
    return rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size))


def _attempt_store(rank: int, size: int, timeout_s: float) -> dist.Store:
    """The launcher's store. One that torchrun's agent keeps outlives a restart, so there each attempt has a prefix of its own: gloo would
    otherwise read the dead workers' addresses."""
    timeout = timedelta(seconds=timeout_s)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=not agent and rank == 0, timeout=timeout
    )
    return dist.PrefixStore(f"attempt_{_meet(store, rank, size, timeout_s)}", store) if agent else store


def _meet(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """A number that all ranks of this attempt know and no earlier attempt had. torchrun's own count differs between nodes that came at
    different times, and stays as it is when a node joins; so rank 0 draws a number and answers every call, those of dead ranks too."""
    if rank:
        call = store.add("torchft/calls", 1)
        number = store.get(f"torchft/answer/{call}").decode()  # waits
        store.add(f"torchft/heard/{number}", 1)
        return number
    number, limit, first = str(store.add("torchft/attempts", 1)), time.monotonic() + timeout_s, 1
    while store.add(f"torchft/heard/{number}", 0) < size - 1:
        calls = store.add("torchft/calls", 0)
        for call in range(first, calls + 1):
            if not store.check([f"torchft/answer/{call}"]):  # an earlier rank 0 may have answered it
                store.set(f"torchft/answer/{call}", number)
        first = calls + 1
        if time.monotonic() > limit:
            raise dist.DistStoreError(f"{size} processes announced, some did not come within {timeout_s:g} s")
        time.sleep(0.01)
    return number


def set_deterministic(on: bool) -> None:
    """Only algorithms that give the same bits every time, or any. Before the first CUDA matrix product: cuBLAS reads its workspace
    setting then. Without the fill of fresh memory that torch adds to find reads of unset values, and which costs time."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = False


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def comm_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where small tensors must live to be reduced by this group (None: the default one)."""
    if dist.is_initialized() and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def agree(value: int, group: dist.ProcessGroup | None = None) -> int:
    """The largest `value` of any rank, on every rank. The one primitive for each branch that changes collectives (stop, save,
    skip): a signal or an error may reach one rank alone, and a branch taken by one rank alone hangs all others.

    group: another group of all ranks, here and below; a thread beside the training needs one of its own.
    """
    if world_size() == 1:
        return int(value)
    flag = torch.tensor([int(value)], dtype=torch.int64, device=comm_device(group))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return int(flag.item())


def agreed(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """This rank's result of an action; CheckpointError on every rank, with all reasons, if it failed on any."""
    problem, result = "", None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # whatever it is, the other ranks must hear of it; it is raised again below
        problem = f"rank {rank()}: {type(error).__name__}: {error}"
    if agree(bool(problem), group):
        raise CheckpointError("; ".join(filter(None, over_ranks(problem, group))))
    return result  # type: ignore[return-value]


def on_rank_0(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's result of an action that only rank 0 runs, on every rank; CheckpointError on every rank if it failed."""
    return broadcast_object(agreed(lambda: action() if rank() == 0 else None, group), group)  # type: ignore[return-value]


def over_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The distinct values of all ranks (told apart by their repr), those of lower ranks first; equal ones travel once."""
    if world_size() == 1:
        return [value]
    key = hashlib.sha256(repr(value).encode()).hexdigest()
    keys = gather_objects(key, group)
    values = gather_objects(value if keys.index(key) == rank() else None, group)
    return [values[i] for i, key in enumerate(keys) if keys.index(key) == i]


def broadcast_object(value: object, group: dist.ProcessGroup | None = None) -> object:
    """Rank 0's value on every rank (small Python objects)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group, device=comm_device(group))
    return box[0]


def gather_objects(value: object, group: dist.ProcessGroup | None = None) -> list:
    """Every rank's value on every rank, by rank (small Python objects)."""
    if world_size() == 1:
        return [value]
    box: list = [None] * world_size()
    dist.all_gather_object(box, value, group=group)
    return box


def wait_for_rank_0(call: Callable[[], None]) -> None:
    """Long work of rank 0 alone: the others wait at the store, not in a collective, whose time limit it may exceed. All ranks call it."""
    if world_size() == 1:
        call()
        return
    store = default_store()
    turn = store.add(f"torchft/waits_of/{rank()}", 1)  # every rank counts its own calls, so that each has a key of its own
    key = f"torchft/rank_0_is_through/{turn}"
    if rank() == 0:
        try:
            call()
        finally:
            store.set(key, "yes")
    while not store.check([key]):
        time.sleep(WAIT_S)


def keyed_seed(*key: object) -> int:
    """A 63-bit seed from the key: equal on every machine, rank and version of Python."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """The one noise rule: a generator that depends on the key alone. Draw at full width, then take this rank's slice."""
    return torch.Generator(device=device).manual_seed(keyed_seed(*key))


def shard_indices(tensor: Tensor, dim: int) -> Tensor | None:
    """Which global indices along `dim` this rank holds of a sharded DTensor: (local size,) int64 on the CPU; None: all of them.

    An index vector is distributed with the tensor's own placements, so strided shards (FSDP inside TP) and uneven ones are right.
    """
    if not isinstance(tensor, DTensor) or not any(_shards(p, dim) for p in tensor.placements):
        return None
    placements = [_along_first(p) if _shards(p, dim) else Replicate() for p in tensor.placements]
    index = torch.arange(tensor.shape[dim], device=tensor.device_mesh.device_type)
    return distribute_tensor(index, tensor.device_mesh, placements, src_data_rank=None).to_local().cpu()


def _shards(placement: Placement, dim: int) -> bool:
    """True for Shard and for the strided shard of FSDP inside TP, whose `is_shard` says no."""
    return getattr(placement, "dim", None) == dim


def _along_first(placement: Placement) -> Placement:
    """The same placement, strided or not, for dim 0 of a vector."""
    return type(placement)(0, split_factor=placement.split_factor) if hasattr(placement, "split_factor") else Shard(0)


def environment(name: str, default: str = "") -> str:
    """An environment variable, for the few modules that need one."""
    return os.environ.get(name, default)


def restart_count() -> int:
    """How often torchrun's agent here has started its processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def secret_values() -> list[str]:
    """The values of the environment variables that hold secrets by their names (HF_TOKEN, WANDB_API_KEY, ...): no output shows them."""
    return [value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= 8]


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment with `more`, for a process it starts."""
    return {**os.environ, **more}


def shutdown(code: int = 0, *, together: bool = True) -> None:
    """Ends this process with `code`: flush, leave the group, exit. Does not return in a process group.

    together: all ranks get here, so they wait for each other (a launcher kills the others when one leaves); false after an error.
    On gloo the interpreter's own teardown races with gloo's threads and aborts at random (SIGABRT after a good run), so the
    process is left by os._exit once everything is flushed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if not dist.is_initialized():
        if code:
            raise SystemExit(code)
        return
    if together:
        dist.barrier()
    if dist.get_backend() == "gloo":
        os._exit(code)
    dist.destroy_process_group()
    raise SystemExit(code)
