"""For all tests: no network, one thread a process, the same examples in every run, GPU tests skip themselves without a GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=15)
settings.register_profile("full", deadline=None, derandomize=True, max_examples=100)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("quick" if config.option.markexpr == "not full" else "full")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
