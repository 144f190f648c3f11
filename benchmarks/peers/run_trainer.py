"""HF Trainer as its users run it: eager or torch_compile=True, LoRA by peft; chats in batches padded to their longest.

Only what it does not do for speed is switched off: saving, evaluation, reports. The loss of a step is what training_step returns.
"""

import torch
from report import Job, Report, count_tokens, read_job, read_samples
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    """One row at the end of each step."""

    def __init__(self, report: Report):
        self.report, self.seen = report, (0.0, 0, 0)

    def on_train_begin(self, *args, **kwargs):
        self.report.begin()

    def on_step_end(self, *args, **kwargs):
        loss, tokens, trained = self.seen
        self.report.step(float(loss), tokens, trained)


class Seen:
    """Mixed into a Trainer: keeps loss and token counts of the step for the clock."""

    clock: Clock

    def training_step(self, model, inputs, *args, **kwargs):
        counts = count_tokens(inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.clock.seen = (loss.detach(), *counts)
        return loss


class SeenTrainer(Seen, Trainer):
    """Trainer with the clock's eyes."""


def arguments(job: Job) -> dict:
    """The arguments that all Trainers of this benchmark share."""
    return {
        "output_dir": job.scratch,
        "per_device_train_batch_size": job.rows,
        "num_train_epochs": 1,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": job.max_norm,
        "optim": "adamw_torch_fused",
        "bf16": False,  # parameters are bf16 themselves where bf16 is asked for
        "torch_compile": job.mode == "compiled",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def load_model(job: Job) -> torch.nn.Module:
    """The model in the dtype of its parameters; in mode lora peft's, its adapter in that dtype too."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job.dtype]
    model = LlamaForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation="sdpa")
    if not job.adapter:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, job.adapter, is_trainable=True, autocast_adapter_dtype=False).to(dtype)


def packages(job: Job, *names: str) -> tuple[str, ...]:
    """The packages whose versions belong to a row."""
    return (*names, "transformers", "accelerate", *(["peft"] if job.adapter else []))


def main() -> None:
    job = read_job()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job.model)
    samples = read_samples(job)
    args = TrainingArguments(**arguments(job), train_sampling_strategy="sequential")
    collator = DataCollatorForSeq2Seq(tokenizer, padding="longest")
    trainer = SeenTrainer(model=load_model(job), args=args, train_dataset=samples, data_collator=collator)
    trainer.clock = Clock(Report(job, *packages(job)))
    trainer.add_callback(trainer.clock)
    trainer.train()


if __name__ == "__main__":
    main()
