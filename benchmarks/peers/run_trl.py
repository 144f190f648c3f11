"""TRL's SFTTrainer, LoRA by peft; chats packed by its own best fit, which lays a step's rows end to end and needs position ids to part
them.

Its default, recomputing activations, is switched off: nobody else here does it.
"""

from datasets import Dataset
from report import Report, read_job, read_samples
from run_trainer import Clock, Seen, arguments, load_model, packages
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


class SeenSFTTrainer(Seen, SFTTrainer):
    """SFTTrainer with the clock's eyes."""


def main() -> None:
    job = read_job()
    args = SFTConfig(
        **arguments(job),
        packing=job.mode == "chat",
        packing_strategy="bfd",
        max_length=job.seq_len,
        train_sampling_strategy="sequential",
    )
    trainer = SeenSFTTrainer(
        model=load_model(job),
        args=args,
        train_dataset=Dataset.from_list(read_samples(job)),
        processing_class=PreTrainedTokenizerFast.from_pretrained(job.model),
    )
    trainer.clock = Clock(Report(job, *packages(job, "trl")))
    trainer.add_callback(trainer.clock)
    trainer.train()


if __name__ == "__main__":
    main()
