"""Lines on stderr: information from rank 0 alone, warnings and errors from every rank with the rank named.

    log = get_logger(__name__)          log.info("loaded %d tensors", n)          log.warning("%d samples were truncated", n)

Nothing is installed at import; a program calls `setup(rank)` once, and again when it knows its rank. As a library in another
program, torchft's lines go wherever that program sends the logger named "torchft".
"""

import logging
import sys

ROOT = "torchft"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, under torchft's own (also for scripts, whose __name__ is `__main__`)."""
    return logging.getLogger(name if name.split(".")[0] == ROOT else f"{ROOT}.{name}")


def setup(rank: int = 0, level: int | str = logging.INFO) -> None:
    """Sends torchft's lines of this level (a number or a name) and above to stderr; replaces what an earlier call installed."""
    logger = logging.getLogger(ROOT)
    for handler in [h for h in logger.handlers if isinstance(h, _RankHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_RankHandler(rank))
    logger.setLevel(level)
    logger.propagate = False  # a library that configures the root logger would print every line twice
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # warns of every gather over two axes


class _RankHandler(logging.StreamHandler):
    def __init__(self, rank: int):
        super().__init__(sys.stderr)
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        return self.rank == 0 or record.levelno >= logging.WARNING

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"[rank {self.rank}] {record.levelname.lower()}: {text}"
