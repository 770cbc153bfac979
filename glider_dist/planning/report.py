"""What is planned for each stage, and the table of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from glider_dist.errors import GliderError
from glider_dist.text_table import table

GB = 1e9


@dataclass
class StagePlan:
    """One column of the table; every dict is in the order of its rows.

    Attributes:
        counts: batch arithmetic: experts, examples, forwards.
        memory: bytes on the rank that needs most, by what needs them.
        host: bytes of the rank's process in the node's memory, likewise; the base's files are not counted but
            where rank 0 reads them for all ranks.
        estimates: traffic and time, from the figures under ``plan`` of the configuration.
    """

    stage: str
    counts: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    estimates: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def check(self, device_gb: float, ways: Sequence[str]) -> None:
        """Look whether the stage fits; ``ways`` are settings with which it needs less.

        Raises:
            GliderError: naming what needs most, if the device has less memory than the stage needs.
        """
        if self.total <= device_gb * GB:
            return
        what, most = max(self.memory.items(), key=lambda item: item[1])
        raise GliderError(
            f"{self.stage} needs {gigabytes(self.total)} GB on a GPU of {device_gb:g} GB (plan.device_gb), "
            f"most of it, {gigabytes(most)} GB, for {what}; {', or '.join(ways)}"
        )


def gigabytes(size: float) -> str:
    return f"{size / GB:.2f}" if size < 100 * GB else f"{size / GB:.0f}"


def seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1e3:.2g} ms"
    return (
        f"{value:.3g} s" if value < 120 else f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"
    )


def stages_table(plans: Sequence[StagePlan]) -> str:
    """A row per quantity, a column per stage."""
    blocks = [
        ("", [plan.counts for plan in plans]),
        ("GB per rank", [{k: gigabytes(v) for k, v in plan.memory.items()} for plan in plans]),
        ("", [{"total, GB": gigabytes(plan.total)} for plan in plans]),
        ("host GB per rank", [{k: gigabytes(v) for k, v in plan.host.items()} for plan in plans]),
        ("estimated", [plan.estimates for plan in plans]),
    ]
    rows = []
    for title, columns in blocks:
        labels = list(dict.fromkeys(label for column in columns for label in column))
        for label in labels:
            name = f"{title}: {label}" if title else label
            rows.append([name, *(column.get(label, "-") for column in columns)])
    stages = [plan.stage for plan in plans]
    return table(["", *stages], rows, right=stages, cut=False)
