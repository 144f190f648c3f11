"""Continues the prompts of a file with a model.

    python recipes/generate.py model.path=runs/mine prompts.path=questions.jsonl output=answers.jsonl sampling.temperature=0.7

The model is a HF folder, a run folder or a checkpoint. Each prompt gives one JSON line: index, prompt, samples, finish. A sample depends on
the seed and its prompt's place in the file, so any batch size gives the same. Started again, the command goes on with a partial output.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torchft import log
from torchft.config.load import load_config
from torchft.config.show import config_dict
from torchft.data.prompts import Prompt, PromptsConfig, read_prompts
from torchft.data.templates import Thinking
from torchft.dist import environment, init_world
from torchft.errors import ConfigError, DataError, Problem
from torchft.generate.generate import Completion, generate
from torchft.generate.model import LanguageModel, Precision, find_model, open_model
from torchft.generate.output import SampleFile
from torchft.generate.sampling import SamplingConfig
from torchft.train.run import run_recipe

logger = log.get_logger(__name__)


@dataclass
class ModelConfig:
    path: str  # a HF folder, a run folder (its export or newest checkpoint) or a checkpoint


@dataclass
class TokenizerConfig:
    path: str | None = None  # folder with a tokenizer, or its file; null: the model's own
    template: str = "auto"  # chat template: auto (the model's own) or a name of docs/data.md, such as chatml
    thinking: Thinking = "mixed"  # as in training; never: the prompt says so


@dataclass
class Config:
    model: ModelConfig
    prompts: PromptsConfig
    output: str  # the .jsonl file to write; a partial one is gone on with
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is any
    precision: Precision = "auto"  # auto: bf16 on CUDA, fp32 elsewhere
    batch_size: int = 16  # samples at once
    plugins: list[str] = field(default_factory=list)  # Python modules or files of your own to import first
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def check(self):
        if self.batch_size < 1:
            yield Problem("batch_size", str(self.batch_size), "at least 1", "use e.g. 16")


def main(argv: list[str]) -> int:
    """Generates as the command line says; the exit code."""
    cfg = load_config(Config, argv, description=__doc__ or "")
    log.setup()
    if int(environment("WORLD_SIZE", "1")) > 1:
        raise ConfigError("this recipe is one process: start it with python, not with torchrun, or split the prompts' file")
    prompts = read_prompts(cfg.prompts)
    settings = kept_settings(cfg)
    with SampleFile(Path(cfg.output), [shown(prompt) for prompt in prompts], settings) as out:
        if out.done:
            logger.info("%s: %d of %d prompts are done", out.path, out.done, len(prompts))
        if out.done < len(prompts):
            model = load_model(cfg)
            complete_all(cfg, model, prompts, encode_all(model, prompts), out)
    print(f"{cfg.output}: {len(prompts)} prompts, {cfg.sampling.num_samples * len(prompts)} samples")
    return 0


def load_model(cfg: Config) -> LanguageModel:
    """The model on its device."""
    device = init_world(cfg.device).device
    template = None if cfg.prompts.raw else cfg.tokenizer.template
    text = {"tokenizer": cfg.tokenizer.path, "template": template, "thinking": cfg.tokenizer.thinking}
    model = open_model(cfg.model.path, device=device, precision=cfg.precision, **text)
    logger.info("model %s, template %s", model.path, "none" if model.template is None else model.template.name)
    return model


def encode_all(model: LanguageModel, prompts: list[Prompt]) -> list[list[int]]:
    """Token ids of every prompt, checked before the first sample is made. Raises DataError that names file and line."""
    return [encode(model, prompt) for prompt in prompts]


def encode(model: LanguageModel, prompt: Prompt) -> list[int]:
    """A chat by the model's template; a raw text as it is, after BOS if the model was pretrained so."""
    tokenizer, most = model.tokenizer, model.decoder.spec.max_seq_len
    try:
        if model.template is not None:
            ids = model.template.prompt(prompt.messages, prompt.tools)
        else:
            ids = [tokenizer.bos_id] * tokenizer.adds_bos + tokenizer.encode(prompt.text or "")
    except DataError as error:
        raise DataError(f"{prompt.where}: {error}") from error
    if len(ids) >= most:
        raise DataError(f"{prompt.where}: given {len(ids)} tokens, expected fewer than the model's max_seq_len={most}: shorten this prompt")
    return ids


def complete_all(cfg: Config, model: LanguageModel, prompts: list[Prompt], ids: list[list[int]], out: SampleFile) -> None:
    """The prompts that are not done, some batches at a time, each written when done; says how fast it goes."""
    at_once = max(1, 4 * cfg.batch_size // cfg.sampling.num_samples)  # several batches, so that like lengths come together
    started, first, num_tokens = time.monotonic(), out.done, 0
    for start in range(first, len(prompts), at_once):
        part = range(start, min(start + at_once, len(prompts)))
        done = generate(
            model.decoder,
            [ids[i] for i in part],
            cfg=cfg.sampling,
            stop_ids=model.stop_ids,
            pad_id=model.tokenizer.pad_id,
            ids=part,
            batch_size=cfg.batch_size,
            tokenizer=model.tokenizer,
        )
        out.write([row(prompts[i], done[n * cfg.sampling.num_samples :][: cfg.sampling.num_samples]) for n, i in enumerate(part)])
        num_tokens += sum(len(completion.tokens) for completion in done)
        seconds = time.monotonic() - started
        left = (len(prompts) - part.stop) * seconds / (part.stop - first)
        logger.info("%d of %d prompts, %.0f new tokens/s, %.0f s left", part.stop, len(prompts), num_tokens / seconds, left)


def row(prompt: Prompt, completions: list[Completion]) -> dict[str, Any]:
    """One line of the output."""
    expected = {} if prompt.expected is None else {"expected": prompt.expected}
    texts, finish = [c.text for c in completions], [c.finish for c in completions]
    return {"prompt": shown(prompt), **expected, "samples": texts, "finish": finish}


def shown(prompt: Prompt) -> str | list[dict[str, str]]:
    """The prompt as it was given: a text, or messages."""
    return prompt.text if prompt.text is not None else [{"role": m.role, "content": m.content} for m in prompt.messages]


def kept_settings(cfg: Config) -> dict[str, Any]:
    """What the samples depend on: another value on going on is an error. Batch size, device and chunks change rounding alone."""
    tree = config_dict(cfg)
    tree["sampling"].pop("prefill_chunk")
    kept = {f"{section}.{key}": value for section in ("tokenizer", "sampling") for key, value in tree[section].items()}
    model = str(find_model(Path(cfg.model.path)).resolve())
    return {"model.path": model, "precision": cfg.precision, "prompts.raw": cfg.prompts.raw, **kept}


if __name__ == "__main__":
    run_recipe(main)
