"""Who takes part, in which modes, and the command of each run.

eager, compiled   full rows of 512 tokens, 4 a step, learning rate 1e-5: the losses of the first steps must agree
chat              one epoch over chats at learning rate 0: the mean loss over all trained tokens must agree, however they are packed
lora              full rows, and an adapter that is given to all; its learning rate is LORA_LR, so that five steps show in the losses
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from peers.envs import python_of
from peers.measure import Case, Start
from peers.report import Job
from peers.workload import SEQ_LEN, read_rows, write_adapter, write_chats, write_full_rows

from torchft.data.packing import plan_window
from torchft.peft.lora import LoraConfig

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = Path(__file__).resolve().parent
SOURCE = ROOT / "configs" / "quickstart" / "data" / "train.jsonl"

ROWS = 4  # of a step
CHATS_A_STEP = 10  # chats for each step asked for: about one step of packed rows
LR = 1e-5
LORA = LoraConfig(rank=16, alpha=32)
LORA_LR = 1e-3
RATES = {"chat": 0.0, "lora": LORA_LR}  # of modes with a rate of their own
MAX_NORM = 1.0


@dataclass(frozen=True)
class Peer:
    """A participant. env: a list in requirements/, "" for torchft's own environment."""

    label: str
    env: str
    driver: str
    modes: tuple[str, ...] = ("eager", "compiled", "chat", "lora")
    chat: str = "packed"  # how it lays chats into rows
    processes: int = 1


PEERS = {
    "ours": Peer("torchft", "", ""),
    "bare": Peer("bare PyTorch loop", "hf", "run_bare.py"),
    "trainer": Peer("HF Trainer", "hf", "run_trainer.py", chat="padded"),
    "trl": Peer("TRL SFTTrainer", "trl", "run_trl.py"),
    "torchtune": Peer("torchtune", "torchtune", "run_torchtune.py"),
    "litgpt": Peer("litgpt", "litgpt", "run_litgpt.py", modes=("eager", "chat", "lora"), chat="padded"),
    "ours-fsdp2": Peer("torchft, FSDP2 x 2", "", "", modes=("eager", "chat", "lora"), processes=2),
}


@dataclass(frozen=True)
class Prepared:
    """Everything that lies ready."""

    model: Path
    cache: Path
    pythons: dict[str, Path]  # by environment

    def data(self, mode: str) -> Path:
        return self.cache / "data" / ("chats" if mode == "chat" else "full")

    @property
    def adapter(self) -> Path:
        return self.cache / "data" / "adapter"


def prepare(peers: list[str], cache: Path, model: Path, steps: int) -> Prepared:
    """Environments of these peers, and data for `steps` steps. Raises ConfigError where an environment can't be had."""
    pythons = {env: python_of(env, cache / "envs") for env in dict.fromkeys(PEERS[peer].env for peer in peers) if env}
    prepared = Prepared(model, cache, pythons)
    write_full_rows(prepared.data("eager"), model, SOURCE, ROWS * steps)
    write_chats(prepared.data("chat"), model, SOURCE, CHATS_A_STEP * steps)
    write_adapter(prepared.adapter, model, LORA)
    return prepared


def start_of(case: Case, prepared: Prepared, *, threads: int) -> Start:
    """The command of a run and its files. threads: shared by its processes."""
    peer, chat = PEERS[case.peer], case.mode == "chat"
    name = f"{case.peer}-{case.mode}-{case.dtype}"
    folder, compiled = prepared.cache / "runs" / name, prepared.cache / "compiled" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    each = max(1, threads // peer.processes)
    if not peer.driver:
        run = folder / "run"
        return Start(
            _our_command(case, peer, prepared, run),
            run / "metrics.jsonl",
            each,
            compiled,
            count_trained(prepared.data(case.mode), packed=chat),
        )
    rows, job_file = folder / "rows.jsonl", folder / "job.json"
    job = Job(
        model=str(prepared.model),
        data=str(prepared.data(case.mode) / "tokens.jsonl"),
        out=str(rows),
        scratch=str(folder / "scratch"),
        mode=case.mode,
        dtype=case.dtype,
        rows=ROWS,
        seq_len=SEQ_LEN,
        lr=RATES.get(case.mode, LR),
        max_norm=MAX_NORM,
        adapter=str(prepared.adapter) if case.mode == "lora" else "",
    )
    job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    return Start([str(prepared.pythons[peer.env]), str(DRIVERS / peer.driver), str(job_file)], rows, each, compiled, [])


def count_trained(data: Path, *, packed: bool) -> list[int]:
    """Tokens with a loss in each of our steps: the rows are a function of the lengths, in the files' order."""
    samples = read_rows(data)
    packs = plan_window([len(s["input_ids"]) for s in samples], SEQ_LEN) if packed else [[i] for i in range(len(samples))]
    counts = [sum(label != -100 for i in pack for label in samples[i]["labels"]) for pack in packs]
    return [sum(counts[start : start + ROWS]) for start in range(0, len(counts), ROWS)]


def _our_command(case: Case, peer: Peer, prepared: Prepared, run: Path) -> list[str]:
    """The recipe as users start it, without what comes after the last step."""
    chat, lora = case.mode == "chat", case.mode == "lora"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(peer.processes)] if peer.processes > 1 else []
    return [
        sys.executable,
        *launch,
        str(ROOT / "recipes" / ("lora_finetune.py" if lora else "full_finetune.py")),
        f"output_dir={run}",
        f"model.path={prepared.model}",
        f"data.train=[{{path: {prepared.data(case.mode) / 'chats.jsonl'}}}]",
        f"data.cache={prepared.cache / 'tokens'}",
        f"data.seq_len={SEQ_LEN}",
        f"data.packing={str(chat).lower()}",
        "data.shuffle=false",
        f"optim.lr={RATES.get(case.mode, LR)}",
        "optim.weight_decay=0.0",
        f"optim.max_norm={MAX_NORM}",
        "schedule.name=constant",
        "train.epochs=1",
        f"train.global_batch_size={ROWS}",
        f"train.micro_batch_size={ROWS // peer.processes}",
        f"precision.params={case.dtype}",
        f"compile.enabled={str(case.mode == 'compiled').lower()}",
        "checkpoint.every_steps=0",
        "checkpoint.save_at_end=false",
        "export.hf=false",
        "metrics.sinks=[jsonl]",
        *([f"adapter.path={prepared.adapter}", "export.adapter=false"] if lora else []),
    ]
