"""Fixed prompts, continued greedily at each validation: samples/step_N.jsonl, one {"prompt", "text", "finish"} a line.

All ranks run the same forwards, as FSDP2 needs them to; rank 0 writes.
"""

import json

import torch
from torch.distributed.fsdp import FSDPModule

from torchft.data.types import Message
from torchft.generate.generate import generate
from torchft.generate.sampling import SamplingConfig
from torchft.log import get_logger
from torchft.train.run import Run
from torchft.train.setup import Job

log = get_logger(__name__)


def sample_prompts(cfg, run: Run, job: Job, step: int) -> None:
    """Continues validate.prompts with the model as it is after `step`; nothing without prompts."""
    if not cfg.validate.prompts:
        return
    template, tokenizer, model = job.text.template, job.text.tokenizer, job.parts.modules[0]
    prompts = [template.prompt([Message("user", text)]) for text in cfg.validate.prompts]
    sampling = SamplingConfig(max_new_tokens=cfg.validate.prompt_tokens)
    with torch.compiler.set_stance("force_eager"):  # a cache that grows would compile at every token
        done = generate(
            model, prompts, cfg=sampling, stop_ids=template.stop_ids, pad_id=tokenizer.pad_id, dtype=cfg.precision.compute_dtype
        )
    if isinstance(model, FSDPModule):
        model.reshard()  # the root stays gathered after a forward
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
