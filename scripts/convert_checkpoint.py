"""Converts a model to a complete HF folder:  python scripts/convert_checkpoint.py SRC DST [--dtype bf16] [--verify]

The same as `torchft convert SRC DST`; what it does stands in torchft/checkpoint/convert.py.
"""

import sys

from torchft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
