"""The command ``slurm``: the whole pipeline as a chain of batch jobs. Starts no ranks and loads no model."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.planning.slurm_chain import Link, make_chain
from glider_dist.planning.slurm_earlier import check_shards
from glider_dist.planning.slurm_script import (
    MAY_STAY,
    RANK,
    SITE,
    TEMPLATE,
    Site,
    chain_script,
    directives,
    stage_script,
)
from glider_dist.planning.slurm_settings import SlurmConfig
from glider_dist.pool.files import replacing
from glider_dist.settings import read_config

if TYPE_CHECKING:
    from glider_dist.cli import Arguments

USAGE = """usage: glider-dist slurm ACTION [CONFIG.yaml] [key=value ...] [--dry-run]

  slurm render    write the batch scripts of the pipeline and submit.sh, which submits them, to RUN_DIR/slurm,
                  with a copy of CONFIG.yaml, which the jobs read
  slurm submit    the same, and submit them; each line printed is a stage and its job
  --dry-run       print the scripts instead

  nodes=N       nodes per job                 ranks=N     ranks per node
  shards=N      jobs per array                time=LIMIT  of each job
  stages=[..]   the chain                     service=true|false
  site=FILE     the cluster's settings        launcher=srun|deepspeed
  scripts=FOLDER
  Short for slurm.nodes and so on; every other key=value is the stages' own. RUN_DIR is run_dir, else runs/slurm;
  each stage has a folder in it, and the pool is RUN_DIR/pool unless pool= names one.

Members of the arrays train the experts of their shard only, and shards that the pool has are left out: submitting
again after a failure does what is missing. A job that is pre-empted or reaches its limit goes on where it was.
"""

_SHORT = tuple(item.name for item in fields(SlurmConfig))
_STAGES = (
    "fetch", "train-experts", "train-gates", "describe", "index", "calibrate", "evaluate", "train-joint",
)  # fmt: skip


def run(arguments: Arguments) -> int:
    """Render or submit; returns the exit code.

    Raises:
        GliderError: a wrong action, configuration, site file or stage, there is unfinished training of another
            number of shards, squeue does not tell of earlier jobs, or sbatch refuses one.
    """
    from glider_dist.commands import COMMANDS

    action = arguments.words[0] if arguments.words else ""
    if action not in ("render", "submit") or len(arguments.words) > 1:
        raise GliderError(f"slurm does render and submit, not {' '.join(arguments.words)!r}; see slurm --help")
    overrides = [f"slurm.{item}" if item.partition("=")[0] in _SHORT else item for item in arguments.overrides]
    cfg = read_config(arguments.file, overrides)
    if cfg.tasks.shard is not None:
        raise GliderError("tasks.shard is set by the jobs of an array; use shards=N here")
    run_dir = Path(cfg.run_dir or "runs/slurm").absolute()
    cfg.pool = str(Path(cfg.pool).absolute() if cfg.pool else run_dir / "pool")
    known = [stage for stage in _STAGES if stage in COMMANDS]
    folder = run_dir / "slurm"
    written = arguments.file.read_bytes() if arguments.file else b""
    # Jobs start, and start again, long after this: what they read must not change with the user's file.
    file = folder / f"config-{hashlib.sha256(written).hexdigest()[:12]}.yaml" if arguments.file else None
    scripts = render(cfg, file, overrides, run_dir, known)
    if arguments.dry_run:
        for name, text in scripts.items():
            print(f"==> {folder / name} <==\n{text}")
        return 0
    if file:
        with replacing(file) as temporary:
            temporary.write_bytes(written)
    for name, text in scripts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text)
    if action == "render":
        print(f"bash {folder / 'submit.sh'}")
        return 0
    try:
        code = subprocess.run(["bash", str(folder / "submit.sh")], check=False).returncode
    except OSError as error:
        raise GliderError(f"{folder / 'submit.sh'} cannot be run ({error.strerror})") from None
    if code:
        left = "the jobs that it names above may stay" if code == MAY_STAY else "nothing stays"
        raise GliderError(f"{folder / 'submit.sh'} has failed; {left} submitted")
    return 0


def render(
    cfg: Config, file: Path | None, overrides: Sequence[str], run_dir: Path, known: Sequence[str]
) -> dict[str, str]:
    """The scripts by name, in order of submission; ``submit.sh`` comes last.

    Args:
        file: the configuration that the jobs read.
        overrides: ``key=value`` as typed; those of ``slurm`` are not for the stages.
        known: stages that there are.

    Raises:
        GliderError: see :func:`run`.
    """
    folder = Path(cfg.slurm.scripts).absolute() if cfg.slurm.scripts else Path(__file__).parents[2] / "slurm"
    for name in (TEMPLATE, RANK):
        if not (folder / name).is_file():
            raise GliderError(f"{folder} has no {name}; name the repository's folder slurm/ by slurm.scripts")
    site = Site.read(Path(cfg.slurm.site).absolute() if cfg.slurm.site else folder / SITE)
    chain = make_chain(cfg, known, cfg.slurm.ranks or site.number("RANKS_PER_NODE", 1))
    check_shards(chain, cfg.slurm.shards, run_dir)
    site.number("CPUS_PER_RANK", 1)
    template = (folder / TEMPLATE).read_text()
    submit = shlex.join(["glider-dist", "slurm", "submit", *([str(file)] if file else []), *overrides])

    def script(link: Link) -> str:
        settings = {
            "GLIDER_SCRIPTS": str(folder),
            "GLIDER_SITE": str(site.file),
            "GLIDER_LAUNCHER": cfg.slurm.launcher if link.nodes * link.ranks > 1 else "srun",
            "GLIDER_SERVICE": ("yes" if cfg.service.fallback else "must") if link.service else "no",
            "GLIDER_GROUP": run_dir.name,
            "GLIDER_SUBMIT": submit,
        }
        if link.shards:
            settings["GLIDER_SHARDS"] = str(cfg.slurm.shards)
        words = [link.stage, *([str(file)] if file else [])]
        words += [item for item in overrides if not item.startswith(("slurm.", "pool=", "run_dir="))]
        words += [f"pool={cfg.pool}", f"run_dir={run_dir / link.stage}"]
        return stage_script(template, directives(link, cfg, site, run_dir / "slurm"), settings, words)

    scripts = {f"{link.stage}.sbatch": script(link) for link in chain}
    return {**scripts, "submit.sh": chain_script(chain, run_dir / "slurm", Path.cwd())}
