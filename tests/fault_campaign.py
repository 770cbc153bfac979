"""Random faults against small jobs: each is broken off once, started again until it is done, and compared.

    python tests/fault_campaign.py FOLDER [FAULTS]

Co-training of experts and gates, joint training and evaluation, with its embeddings from a service or without, on
one and two ranks. Results go to
FOLDER/faults.jsonl, a line a fault; a second start does the faults that are missing. Ranks are forked from a
process that has imported everything, which makes a start cheap; they are processes of their own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_jobs import JOBS, Launch, Place, clean, difference, prepare, reference, result_of, template
from service_process import Service, start_service

from glider_dist.errors import EXIT_STOPPED, GliderError
from glider_dist.pool import ExpertPool
from glider_dist.pool.verify import verify
from glider_dist.testing import save_tiny_base, tiny_causal
from glider_dist.training.checkpoint import Checkpoints

FAULTS = (
    "kill one rank", "kill all ranks", "stop and continue", "SIGTERM", "SIGUSR1", "SIGUSR2",
    "truncated file", "flipped bit", "full disk", "dead service",
)  # fmt: skip
DAMAGE = ("truncated file", "flipped bit")
ROUNDING = 1e-3
_PRELOAD = ["small_jobs", "glider_dist.cli", "glider_dist.quickstart", "deepspeed", "torch.distributed"]


@dataclass(frozen=True)
class Fault:
    """One line of the record.

    Attributes:
        starts: until the job was done, the broken-off one included.
        lost: bytes of files of the pool, or checkpoints that nobody damaged, that could not be read afterwards.
        difference: of the result from that of the job without a fault; 0 is every bit.
        problem: what was wrong, or "".
    """

    number: int
    job: str
    ranks: int
    fault: str
    starts: int
    lost: int
    difference: float
    problem: str

    @property
    def changed(self) -> bool:
        return self.difference > (ROUNDING if self.fault in DAMAGE else 0.0)


def unreadable(place: Place, damaged: Path | None) -> tuple[int, str]:
    """Bytes that cannot be read though nobody damaged them, and why."""
    lost, why = 0, ""
    if (place.folder / "pool" / "pool.json").exists():
        problems = [text for text in verify(ExpertPool.open(place.folder / "pool")) if "was left by" not in text]
        if problems:
            lost, why = lost + 1, problems[0]
    for kind in ("expert", "gate", "joint", "joint/experts"):
        files = Checkpoints(place.folder / "run" / "checkpoints" / kind)
        for name in files.names():
            for step in files.steps(name):
                path = files.path(name, step)
                try:
                    files.read(name, step)
                except GliderError as error:
                    if path != damaged:
                        lost, why = lost + path.stat().st_size, str(error)
    return lost, why


def damage(place: Place, fault: str, draw: random.Random) -> Path | None:
    """Cut or flip a bit of one of the newest checkpoint files, if there are any."""
    folders = {path.parent for path in (place.folder / "run" / "checkpoints").rglob("step-*.safetensors")}
    newest = [max(folder.glob("step-*")) for folder in sorted(folders)]
    newest += sorted((place.folder / "run" / "rows" / "partial").glob("*.json"))
    if not newest:
        return None
    path = draw.choice(newest)
    content = bytearray(path.read_bytes())
    if fault == "flipped bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    else:
        del content[draw.randrange(len(content)) :]
    path.write_bytes(bytes(content))
    return path


class Embeddings:
    """The embedding service of the served jobs, which may be killed; it remembers nothing."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.running = self._start(None)

    def _start(self, port: int | None) -> Service:
        return start_service(self.folder, "service.cache=off", port=port)

    @property
    def url(self) -> str:
        return self.running.url

    def kill_and_start(self) -> None:
        self.running.end()
        self.running = self._start(int(self.url.rpartition(":")[2]))


def inject(
    place: Place, launch: Launch, fault: str, service: Embeddings, draw: random.Random
) -> tuple[bool, int, Path | None]:
    """Do it to a running job and wait for its end: whether it came in time, the exit code, what was damaged."""
    everyone = range(len(launch.processes))
    one = [draw.choice(everyone)]
    damaged = None
    if fault == "stop and continue":
        came = launch.send(signal.SIGSTOP, one)
        time.sleep(draw.uniform(0.1, 1.0))
        launch.send(signal.SIGCONT, one)
    elif fault == "dead service":
        came = launch.running
        service.kill_and_start()
    elif fault.startswith("SIG"):
        came = launch.send(getattr(signal, fault), one)
    else:
        came = launch.send(signal.SIGKILL, one if fault == "kill one rank" else everyone)
    code = launch.wait()
    if came and fault in DAMAGE:
        damaged = damage(place, fault, draw)
        came = damaged is not None
    return came, code, damaged


def try_fault(
    number: int, place: Place, ranks: int, fault: str, seconds: float, service: Embeddings, draw: random.Random
) -> Fault | None:
    """Break the job off once, start it until it is done; None if it was done before the fault came."""
    output = place.folder / "output.txt"
    ballast = place.folder / "run" / "ballast"
    if fault == "full disk":
        if not place.small:
            return None
        ballast.write_bytes(b"0" * draw.randrange(1_400_000, 3_000_000))
    launch = Launch(place.words, ranks, output)
    damaged: Path | None = None
    if fault == "full disk":
        code = launch.wait()
        came = code != 0
        ballast.unlink()
    else:
        moment = launch.started + draw.uniform(0.1, 1.0) * seconds
        while launch.running and time.monotonic() < moment:
            time.sleep(0.005)
        came, code, damaged = inject(place, launch, fault, service, draw)
    if not came:
        return None
    problem = ""
    if fault.startswith("SIG") and code not in (0, EXIT_STOPPED, -getattr(signal, fault)):
        problem = f"exit code {code} after {fault}"
    if fault == "stop and continue" and code:
        problem = f"exit code {code} after a pause"
    if fault == "dead service" and code:
        problem = f"exit code {code} without the service"
    if fault == "full disk" and "No space left on device" not in output.read_text():
        problem = "the full disk was not told"
    if problem:
        problem += f": {output.read_text(errors='replace')[-1500:]}"
    lost, why = unreadable(place, damaged)
    starts = 1
    while code and starts < 4:
        code = Launch(place.words, ranks, output).wait()
        starts += 1
    if code:
        tail = output.read_text(errors="replace")[-600:]
        return Fault(number, place.job, ranks, fault, starts, lost, float("inf"), f"never done: {tail}")
    return Fault(number, place.job, ranks, fault, starts, lost, 0.0, problem or why)


def table(found: Sequence[Fault]) -> str:
    """Faults by kind: how many, resumed, bytes lost, results changed."""
    lines = [f"{'fault':18}  faults  resumed  bytes lost  results changed  within rounding"]

    def row(name: str, some: Sequence[Fault]) -> str:
        done = sum(one.difference != float("inf") for one in some)
        rounding = sum(0 < one.difference <= ROUNDING for one in some)
        changed = sum(one.changed for one in some)
        return f"{name:18}  {len(some):6}  {done:7}  {sum(o.lost for o in some):10}  {changed:15}  {rounding:15}"

    for fault in FAULTS:
        if some := [one for one in found if one.fault == fault]:
            lines.append(row(fault, some))
    for job in JOBS:
        for ranks in (1, 2):
            if some := [one for one in found if (one.job, one.ranks) == (job, ranks)]:
                lines.append(row(f"{job}, {ranks} rank{'s' * (ranks > 1)}", some))
    lines.append(row("all", found))
    lines += [
        f"fault {one.number}, {one.job} on {one.ranks}, {one.fault}: {one.problem}" for one in found if one.problem
    ]
    return "\n".join(lines)


def campaign(root: Path, faults: int, tell: Callable[[str], Any] = print) -> list[Fault]:
    """Do the faults that ``root/faults.jsonl`` lacks; returns all of them."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    root.mkdir(parents=True, exist_ok=True)
    record = root / "faults.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    found = [Fault(**json.loads(line)) for line in lines]
    base = root / "base"
    if not base.exists():
        save_tiny_base(base, tiny_causal())
    service = Embeddings(root)
    try:
        return _do(root, faults, found, base, service, tell)
    finally:
        service.running.end()


def _do(
    root: Path, faults: int, found: list[Fault], base: Path, service: Embeddings, tell: Callable[[str], Any]
) -> list[Fault]:
    templates = {job: template(root / f"template-{job}", job) for job in JOBS}
    references: dict[tuple[str, int], tuple[Any, float]] = {}
    number = len(found)
    attempt = 0
    while number < faults:
        draw = random.Random(f"{number}/{attempt}")
        fault, job, ranks = draw.choice(FAULTS), draw.choice(JOBS), draw.choice((1, 2))
        job = "served" if fault == "dead service" else job
        if (job, ranks) not in references:
            references[job, ranks] = reference(root, templates[job], job, ranks, base, service.url)
        expected, seconds = references[job, ranks]
        place = prepare(templates[job], root / "job", job, base, service.url, fault == "full disk")
        try:
            one = try_fault(number, place, ranks, fault, seconds, service, draw)
            attempt += 1
            if one is None:
                continue
            if one.difference == 0.0:
                one = Fault(**{**vars(one), "difference": difference(job, expected, result_of(place))})
        finally:
            clean(place)
        number, attempt = number + 1, 0
        found.append(one)
        with open(root / "faults.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(vars(one)) + "\n")
        tell(f"{one.number}: {one.fault}, {job} on {ranks}: {one.starts} starts {one.difference:g} {one.problem}")
    return found


if __name__ == "__main__":
    everything = campaign(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200)
    print(f"\n{table(everything)}")
    sys.exit(any(one.changed or one.lost or one.problem for one in everything))
