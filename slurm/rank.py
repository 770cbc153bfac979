"""One rank of a batch job: ``rank.py FOLDER STAGE ...`` runs ``glider-dist STAGE ...`` and leaves in FOLDER what
the batch script cannot learn from a launcher.

``pid-NODE-RANK`` is where a signal for this rank goes: one sent through Slurm would reach every process below it,
too. ``exit-RANK`` is its exit code, absent if it was killed: ``deepspeed`` returns 0 then. "Go on later" (85)
leaves with 0, or ``srun --kill-on-bad-exit`` would kill the ranks that are still at their checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

AGAIN = 85


def leave(folder: Path, name: str, number: int) -> None:
    # On a full disk an empty file would stay, which tells nothing.
    (folder / f".{name}").write_text(f"{number}\n")
    (folder / f".{name}").replace(folder / name)


def run(folder: Path, words: list[str]) -> int:
    rank = os.environ["SLURM_PROCID"]
    leave(folder, f"pid-{os.environ['SLURMD_NODENAME']}-{rank}", os.getpid())
    try:
        from glider_dist.cli import main

        code = main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        leave(folder, f"exit-{rank}", 1)
        raise
    leave(folder, f"exit-{rank}", code)
    return 0 if code == AGAIN else code


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
