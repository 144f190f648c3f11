"""A validation of the model as it is after a step, and what follows from it: its row, samples, the best checkpoint, an early end.

Fixed prompts are continued greedily into samples/step_N.jsonl, one {"prompt", "text", "finish"} a line. All ranks run the same
forwards, as FSDP2 needs them to; rank 0 writes.
"""

import json

import torch

from torchft.generate.generate import generate
from torchft.generate.sampling import SamplingConfig
from torchft.log import get_logger
from torchft.train.job import Job
from torchft.train.run import Run

log = get_logger(__name__)


def run_validation(cfg, run: Run, job: Job, step: int) -> None:
    """Validates after `step`; 0: before the first, which is logged and sampled, and counts neither as best nor for an early stop.

    A run that is asked to stop leaves off at the next batch, without a row."""
    run.place = f"validation after step {step}"
    with run.goodput.timing("validation"):
        found = job.validate(run.asked_to_stop)
        if found is None:
            log.warning("validation after step %d left off: the run was asked to stop", step)
            return
        metrics = run.log_validation(step, found)
        if cfg.validate.prompts:
            sample_prompts(cfg, run, job, step)
    if step == 0:
        return
    job.store.note_metric(step, metrics)
    if job.early_stop.note(metrics):
        run.end_early(step, f"no better {cfg.validate.early_stop.metric}")


def sample_prompts(cfg, run: Run, job: Job, step: int) -> None:
    """Continues validate.prompts with the model as it is."""
    model, dtype = job.parts.modules[0], cfg.precision.compute_dtype
    tokenizer, template = job.text.tokenizer, job.text.template
    stops = tokenizer.stop_ids if template is None else template.stop_ids
    sampling = SamplingConfig(max_new_tokens=cfg.validate.prompt_tokens)
    with torch.compiler.set_stance("force_eager"):  # a cache that grows would compile at every token
        done = generate(model, job.prompts, cfg=sampling, stop_ids=stops, pad_id=tokenizer.pad_id, dtype=dtype)
    job.parts.reshard()
    if run.world.rank != 0:
        return
    rows = [
        {"prompt": prompt, "text": tokenizer.decode(each.tokens), "finish": each.finish}
        for prompt, each in zip(cfg.validate.prompts, done, strict=True)
    ]
    path = run.folder / "samples" / f"step_{step:08d}.jsonl"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:  # a full disk must not cost a run its steps
        log.warning("no samples: %s", error)
    for row in rows:
        log.info("sample after step %d: %r -> %r", step, row["prompt"], row["text"])
