"""Lines on stderr: information from rank 0 alone, warnings and errors from every rank with the rank named.

    log = get_logger(__name__)          log.info("loaded %d tensors", n)          log.warning("%d samples were truncated", n)

Nothing is installed at import; a program calls `setup(rank)` once, and again when it knows its rank. As a library in another
program, torchft's lines go wherever that program sends the logger named "torchft".
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

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


def add_file(path: Path, rank: int = 0) -> Callable[[], None]:
    """Writes the same lines to a file as well, with time and level; it is made at the first line. Gives the function that ends it."""
    handler = _FileHandler(path, rank)
    logging.getLogger(ROOT).addHandler(handler)

    def remove() -> None:
        logging.getLogger(ROOT).removeHandler(handler)
        handler.close()

    return remove


class _FileHandler(logging.FileHandler):
    def __init__(self, path: Path, rank: int):
        super().__init__(path, encoding="utf-8", delay=True)
        self.rank = rank
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def filter(self, record: logging.LogRecord) -> bool:
        return self.rank == 0 or record.levelno >= logging.WARNING

    def emit(self, record: logging.LogRecord) -> None:
        """A file that can't be opened is logging's to report, like one that can't be written: never the run's end."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)


class _RankHandler(logging.StreamHandler):
    def __init__(self, rank: int):
        super().__init__(sys.stderr)
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        return self.rank == 0 or record.levelno >= logging.WARNING

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"[rank {self.rank}] {record.levelname.lower()}: {text}"
