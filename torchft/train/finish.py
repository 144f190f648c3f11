"""The end of a run: last checkpoint, the model as a HF folder, plot, summary and report.html, the exit code."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torchft.checkpoint.assets import Assets, read_assets
from torchft.checkpoint.folder import BEST, step_name, step_of
from torchft.checkpoint.hf import save_hf
from torchft.checkpoint.hub import HUB_ID, TO_LOG_IN, has_token, push_folder
from torchft.checkpoint.load import load_weights_only
from torchft.checkpoint.store import Store
from torchft.dist import broadcast_object, on_rank_0, wait_for_rank_0
from torchft.dtypes import DTYPES
from torchft.errors import CheckpointError, Problem, TorchftError
from torchft.log import get_logger
from torchft.metrics.plot import plot_run
from torchft.metrics.rows import read_rows
from torchft.metrics.summary import summarise, summary_text, write_summary
from torchft.train.adapter import export_adapter, export_merged, is_whole_model
from torchft.train.card import model_card
from torchft.train.job import Job
from torchft.train.record import read_run
from torchft.train.report import write_report
from torchft.train.run import STOPPED, Run

log = get_logger(__name__)


@dataclass
class ExportConfig:
    hf: bool = True  # at the end write export/step_N, a folder that transformers and servers load
    best: bool = False  # export the checkpoint that checkpoint.best_by chose instead of the last step
    dtype: Literal["fp32", "bf16"] | None = None  # of the exported weights; null: as precision.params
    shard_size: str = "5GB"  # largest weights file, in MB or GB
    push: str | None = None  # publish it on the hub as org/name[@branch]; a new repository is private; needs a login or HF_TOKEN

    def check(self) -> Iterator[Problem]:
        if not re.fullmatch(r"[1-9][0-9]*(MB|GB)", self.shard_size):
            yield Problem("export.shard_size", self.shard_size, "a whole number of MB or GB", "use e.g. 5GB")
        if self.push is not None and not HUB_ID.fullmatch(self.push):
            yield Problem("export.push", self.push, "a hub id: org/name, or org/name@branch", "use your own or your organisation's name")
        elif self.push and not self.writes_anything:
            yield Problem(
                "export.push", f"{self.push} with export.hf=false", "something to publish", "set export.hf=true, or leave push out"
            )
        elif self.push and not has_token():
            yield Problem("export.push", f"{self.push}, and no token", "a token that may write there", TO_LOG_IN)

    @property
    def shard_bytes(self) -> int:
        return int(self.shard_size[:-2]) * {"MB": 10**6, "GB": 10**9}[self.shard_size[-2:]]

    @property
    def writes_anything(self) -> bool:
        return self.hf


@dataclass
class AdapterExportConfig(ExportConfig):
    hf: bool = False  # at the end also write export/step_N, the base with the adapter merged in; later: torchft export
    adapter: bool = True  # at the end write adapter/step_N, which PEFT and vLLM load beside the base; of llama_pro the whole model

    @property
    def writes_anything(self) -> bool:
        return self.hf or self.adapter


def finish_run(cfg, run: Run, job: Job) -> int:
    """Saves and, unless the run was asked to stop, exports; writes plots/ and summary.json; the process's exit code."""
    job.loader.close()
    if run.step and (run.stopped or cfg.checkpoint.save_at_end):
        job.store.save(run.step, required=True)
    folder = None if run.stopped else _export(cfg, run, job)
    if run.world.rank == 0:
        try:
            report(run, job)
        except (OSError, TorchftError) as error:  # the model is saved and exported: a full disk must not make the run a failure
            log.warning("no plot, summary or report: %s", error)
    if folder and cfg.export.push:
        wait_for_rank_0(lambda: _publish(run, folder, cfg.export.push))
    return STOPPED if run.stopped else 0


def _export(cfg, run: Run, job: Job) -> Path | None:
    """Writes what `export` asks for; the folder to publish, if any: the model before the adapter."""
    has_adapter, whole = getattr(cfg, "adapter", None) is not None, is_whole_model(cfg)
    adapter = has_adapter and cfg.export.adapter and not whole
    hf = cfg.export.hf or (whole and cfg.export.adapter)
    if not (hf or adapter):
        return None
    step, folder = load_best(job.store, run.step) if cfg.export.best else run.step, None
    if adapter:
        folder = _free(run, "adapter", step)
        trained = any(job.schedule(n) > 0 for n in range(1, step + 1))
        export_adapter(cfg, job.spec, job.parts, folder, job.store.base, trained=trained)
        log.info("exported the adapter %s", folder)
    if hf:
        folder = _free(run, "export", step)
        if has_adapter and not whole:
            export_merged(cfg, job.store.folder.path / step_name(step), folder)
        else:
            export_hf(cfg, job, folder, card=_card(run, step))
        log.info("exported %s", folder)
    return folder


def _free(run: Run, kind: str, step: int) -> Path:
    """A new folder for what is exported, rank 0's choice."""
    return broadcast_object(free_folder(run.folder / kind / f"step_{step:08d}"))


def _publish(run: Run, folder: Path, name: str) -> None:
    """A hub that fails must not make a finished run a failure."""
    try:
        page = push_folder(folder, name, message=f"{run.folder.resolve().name}, {folder.name}")
        run.sinks.event("published", run.step, page=page)
    except CheckpointError as error:
        log.warning("not published, the model is in %s: %s\n  later:    torchft push %s %s", folder, error, folder, name)
        run.sinks.event("not published", run.step, reason=str(error).splitlines()[0])


def load_best(store: Store, last: int) -> int:
    """Fills the parameters from the checkpoint `best`; its step, or, with a warning and nothing changed, `last` if there is none."""
    path = on_rank_0(lambda: store.folder.pointed(BEST))
    if path is None:
        log.warning("export.best: no validation with checkpoint.best_by came with a checkpoint, so the last step is exported")
        return last
    load_weights_only(path, store.parts, base=store.base)
    return step_of(path)


def free_folder(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist yet: what an earlier try left is never written over."""
    return next(p for p in (path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 10_000))) if not p.exists())


def _card(run: Run, step: int) -> str:
    """README.md of the exported folder, on rank 0, which writes it; a card that can't be made is a warning."""
    if run.world.rank != 0:
        return ""
    try:
        return model_card(read_run(run.folder), step)
    except (OSError, TorchftError) as error:
        log.warning("no model card: %s", error)
        return ""


def export_hf(cfg, job: Job, folder: Path, *, card: str = "") -> None:
    """The model with tokenizer, chat template and card (Markdown, if there is one), complete, on all ranks together."""
    model = read_assets(cfg.model.path) if cfg.model.path else Assets()
    tokenizer = job.text.tokenizer
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    assets = Assets({key: id for key, id in ids.items() if id is not None} | model.config, model.generation, tokenizer.to_files())
    template = job.text.template
    if template is not None and template.source != tokenizer.chat_template:
        assets = assets.with_template(template.source, template.stop_ids)
    if card:
        assets = replace(assets, files=assets.files | {"README.md": card.encode()})
    dtype = DTYPES[cfg.export.dtype] if cfg.export.dtype else None
    save_hf(folder, job.spec, job.parts.named_parameters(), assets, dtype=dtype, shard_bytes=cfg.export.shard_bytes)


def report(run: Run, job: Job) -> None:
    """plots/loss.svg, summary.json and report.html from what the run wrote, and the summary on the console. For rank 0."""
    rows = read_rows(run.folder / "metrics.jsonl")
    saved = sorted(path.name for path in (run.folder / "checkpoints").glob("step_*") if path.is_dir())
    summary = summarise(rows, run_dir=run.folder, wall_s=time.monotonic() - run.started, skipped=run.skipped_steps, checkpoints=saved)
    summary["goodput"] = run.goodput.summary()
    write_summary(run.folder / "summary.json", summary)
    print(summary_text(summary), flush=True)
    if rows:
        (run.folder / "plots").mkdir(exist_ok=True)
        plot_run(run.folder / "plots" / "loss.svg", rows, title=run.folder.name)
    run.record(outcome="stopped" if run.stopped else "finished")
    write_report(read_run(run.folder), run.folder / "report.html", verify="quick")  # just saved: hashing terabytes again can wait
