"""The settings of ``glider-dist slurm``."""

from __future__ import annotations

from dataclasses import dataclass

from glider_dist.fields import positive, setting


@dataclass
class SlurmConfig:
    """The jobs that ``glider-dist slurm`` submits. What belongs to the cluster (partition, account, GPUs per node,
    modules, container, network interface, scratch) is in its site file."""

    nodes: int = positive(1, "nodes per job; fetch, describe and index take one")
    ranks: int | None = positive(None, "ranks per node; None: RANKS_PER_NODE of the site file")
    shards: int = positive(1, "jobs over which train-experts and train-gates share the held-in tasks")
    time: str | None = setting(None, "time limit of a job as Slurm writes it; None: TIME of the site file")
    stages: list[str] = setting(
        ["train-experts", "train-gates", "describe", "index", "calibrate", "evaluate"],
        "the chain, in order; fetch fills the caches before it, train-joint may follow it",
    )
    launcher: str = setting("srun", "what starts the ranks", ("srun", "deepspeed"))
    service: bool = setting(
        True,
        "an embedding service beside the ranks of calibrate, evaluate and train-joint, if there are several",
    )
    scripts: str | None = setting(None, "folder with stage.sbatch and rank.py; None: slurm/ beside the package")
    site: str | None = setting(None, "the cluster's settings; None: site.env in slurm.scripts")
