"""The faults of `torchft chaos`: as the user writes them, as torchft/faults.py is armed with them, and drawn from a seed.

kill:step=5:rank=1:point=save.mid_data --parse_fault--> Fault --armed--> kill:save.mid_data:step=5:rank=1
"""

import random
from dataclasses import dataclass

from torchft.errors import ConfigError, Problem
from torchft.faults import POINTS

SAVE_POINTS = tuple(point for point in POINTS if point.startswith("save."))
# kind -> the fault of torchft/faults.py and where it fires if the script does not say
KINDS = {
    "kill": ("kill", "step"),
    "stop": ("stop", "step"),
    "corrupt": ("kill", "step"),
    "fill": ("full", "save.mid_data"),
    "slow": ("sleep", "step"),
    "nan": ("nan", "batch"),
}


@dataclass(frozen=True)
class Fault:
    """One fault to be: `kill:step=5:rank=1:point=save.mid_data`, `slow:step=3:seconds=2`."""

    kind: str
    step: int
    rank: int = 0
    point: str = ""
    seconds: float = 1.0

    @property
    def armed(self) -> str:
        """As torchft/faults.py reads it."""
        kind, point = KINDS[self.kind]
        seconds = f":seconds={self.seconds:g}" if self.kind == "slow" else ""
        return f"{kind}:{self.point or point}:step={self.step}:rank={self.rank}{seconds}"


def parse_fault(text: str) -> Fault:
    """Raises ConfigError."""
    kind, *pairs = text.split(":")
    values = dict(pair.partition("=")[::2] for pair in pairs)
    problem = Problem("--fault", text, f"KIND:step=N[:rank=R][:point=P][:seconds=S], KIND one of {', '.join(KINDS)}", "correct it")
    point = values.get("point", "")
    good_point = not point or (kind in ("kill", "stop", "fill") and point in SAVE_POINTS)
    if (
        kind not in KINDS
        or not values.get("step", "").isdecimal()
        or values.keys() - {"step", "rank", "point", "seconds"}
        or not good_point
    ):
        raise ConfigError(problem)
    try:
        return Fault(kind, int(values["step"]), int(values.get("rank", 0)), point, float(values.get("seconds", 1)))
    except ValueError:
        raise ConfigError(problem) from None


def random_faults(count: int, seed: int, *, num_steps: int, every_steps: int, ranks: int) -> list[Fault]:
    """`count` faults drawn from the seed; damage comes once there are two checkpoints, so that there is one to fall back to."""
    draw = random.Random(seed)
    saves = range(every_steps, num_steps + 1, every_steps)
    faults = []
    for _ in range(count):
        kind = draw.choice([kind for kind in KINDS if kind != "corrupt" or 2 * every_steps < num_steps])
        in_save = kind == "fill" or (kind == "kill" and draw.random() < 0.5)
        first = 2 * every_steps + 1 if kind == "corrupt" else 1
        step = draw.choice(saves) if in_save else draw.randint(first, num_steps)
        point = draw.choice(SAVE_POINTS) if in_save and kind == "kill" else ""
        faults.append(Fault(kind, step, draw.randrange(ranks), point))
    return sorted(faults, key=lambda fault: fault.step)
