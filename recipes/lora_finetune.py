"""Fine-tuning of a LoRA adapter on chats: the base stays frozen, small matrices beside its linear layers train (docs/lora.md).

    python recipes/lora_finetune.py --config configs/quickstart/lora.yaml model.path=FOLDER
    torchrun --nproc_per_node 8 recipes/lora_finetune.py --config configs/llama3/8b_lora.yaml adapter.rank=32

The end is adapter/step_N, PEFT's files, beside checkpoints that hold the adapter and the optimizer alone. The loop is full_finetune.py's.
"""

from dataclasses import dataclass, field
from typing import Literal

from torchft.checkpoint.store import CheckpointConfig
from torchft.config.load import load_config
from torchft.data.loader import DataConfig
from torchft.losses.cross_entropy import LossConfig
from torchft.metrics.sinks import MetricsConfig
from torchft.optim.build import OptimConfig, set_lr
from torchft.optim.schedules import ScheduleConfig
from torchft.parallel.compile import CompileConfig
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig
from torchft.parallel.recompute import MemoryConfig
from torchft.quant.swap import QuantConfig
from torchft.train.adapter import AdapterConfig
from torchft.train.data import TokenizerConfig
from torchft.train.finish import AdapterExportConfig, finish_run
from torchft.train.run import DebugConfig, Run, run_recipe
from torchft.train.setup import ModelConfig, TrainConfig, ValidateConfig, build_job
from torchft.train.validation import run_validation


@dataclass
class Config:
    output_dir: str  # folder of the run: checkpoints, metrics, plots, the adapter
    seed: int = 0  # of the data order and of random weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is any
    plugins: list[str] = field(default_factory=list)  # Python modules or files of your own to import first
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    export: AdapterExportConfig = field(default_factory=AdapterExportConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


def main(argv: list[str]) -> int:
    """Trains as the command line says; the exit code."""
    cfg = load_config(Config, argv, description=__doc__ or "")
    with Run(cfg) as run:
        job = build_job(cfg, run)
        if cfg.validate.at_start and run.step == 0:
            run_validation(cfg, run, job, step=0)

        for step in run.steps(last=job.num_steps):
            lr = job.schedule(step)
            set_lr(job.optimizer, lr)
            with run.meter.waiting():
                batches = job.next_step(step)
            stats = job.train_step(step, batches, max_norm=cfg.optim.max_norm, nonfinite=cfg.train.nonfinite)
            run.log(step, stats, lr)
            if cfg.validate.is_due(step, last=job.num_steps):
                run_validation(cfg, run, job, step)
            job.store.save_if_due(step)

        return finish_run(cfg, run, job)


if __name__ == "__main__":
    run_recipe(main)
