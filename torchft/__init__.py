"""torchft: native-PyTorch training of language models. Importing it has no side effects; import from the defining module."""

__version__ = "0.1.0"
