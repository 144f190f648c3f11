"""One run a folder: a lock file with host and process id. A lock whose process on this host is gone is taken over."""

import os
import socket
from pathlib import Path

from torchft.errors import ConfigError


def take_lock(path: Path) -> None:
    """Creates the lock file. Raises ConfigError if another live run holds it."""
    mine = f"{socket.gethostname()} {os.getpid()}\n"
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(mine)
            return
        except FileExistsError:
            holder = path.read_text(encoding="utf-8").split()
            if len(holder) == 2 and _is_alive(*holder):
                break
            path.unlink(missing_ok=True)
    raise ConfigError(
        f"another run holds it: host {holder[0]}, process {holder[1]}\n  expected: one run a folder\n"
        f"  fix:      wait for it, choose another output_dir, or delete {path} if that process is gone"
    )


def _is_alive(host: str, pid: str) -> bool:
    """True if the process may still run: on another host nobody can tell."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return int(pid) != os.getpid()
