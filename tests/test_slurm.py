"""The pipeline as batch jobs on a real Slurm of three nodes: chains, requeues, crashes, cancelled jobs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_cluster import Cluster, cluster, install
from small_jobs import HELD_IN, adapters, command, cores, environment, largest_difference, settings, write_tasks

from glider_dist.testing import save_tiny_base, tiny_causal

pytestmark = [pytest.mark.slurm, pytest.mark.jobs]
SLURM = Path(__file__).resolve().parents[1] / "slurm"
# Long enough to be interrupted.
LONG = {"train__max_steps": 300, "train__eval_every": 100, "train__save_steps": 10}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.fail("a Slurm of several nodes needs root; run without --slurm to leave these tests out")
    install()
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster", 3) as made:
        yield made


@dataclass
class Work:
    """A folder with a base, tasks and a site file, and the cluster to run it on."""

    folder: Path
    slurm: Cluster

    def settings(self, **changes: object) -> list[str]:
        return settings(self.folder, base=self.folder / "base", **{"service__fallback": "false", **changes})

    def glider(self, *words: str) -> str:
        """``glider-dist`` as a user runs it on the submitting machine; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "glider_dist", *words],
            env=self.env, cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def env(self) -> dict[str, str]:
        return environment(SLURM_CONF=self.slurm.env["SLURM_CONF"])

    def submit(self, *words: str, **changes: object) -> dict[str, str]:
        """``glider-dist slurm submit``; job ids by stage."""
        site = f"site={self.folder / 'site.env'}"
        out = self.glider("slurm", "submit", *self.settings(**changes), site, *words)
        return dict(line.split() for line in out.splitlines())

    def text(self, stage: str) -> str:
        """What the jobs of a stage printed."""
        return "\n".join(path.read_text() for path in sorted((self.folder / "run/slurm").glob(f"{stage}-*.out")))

    def attempts(self, stage: str) -> list[dict[str, str]]:
        """What the ranks of a stage's one job left, attempt by attempt."""
        folders = sorted((self.folder / "run" / stage / "slurm").glob("*/attempt-*"))
        return [{path.name: path.read_text().strip() for path in folder.glob("*-*")} for folder in folders]

    def until(self, what: str, done: Callable[[], object], seconds: float = 180.0) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"{what}: not after {seconds} s\n{self.text('*')}"
            time.sleep(0.1)

    def until_in_the_middle(self, job: str, stage: str, experts: int = len(HELD_IN)) -> None:
        """Wait until so many experts have trained for some steps and are kept: with all, every rank has."""
        kept = self.folder / "run" / stage / "checkpoints"

        def found() -> bool:
            assert self.slurm.job_states(job)[-1] in ("PENDING", "RUNNING"), self.text("*")
            return len({path.parent for path in kept.glob("expert/*/step-*.safetensors")}) == experts

        self.until("all are kept", found)


@pytest.fixture
def work(tmp_path: Path, slurm: Cluster) -> Work:
    save_tiny_base(tmp_path / "base", tiny_causal())
    write_tasks(tmp_path / "tasks")
    site = (SLURM / "site.env").read_text()
    own = f"""
        PYTHON=({sys.executable})
        TIME=30
        INTERFACE=eth0
        SCRATCH={tmp_path}
        FILE_SECONDS=3
        STOP_SECONDS=20
        MAX_RESTARTS=3
        site_check() {{ [ ! -e {tmp_path}/broken-$SLURMD_NODENAME ]; }}
    """
    (tmp_path / "site.env").write_text(site + re.sub(r"^ +", "", own, flags=re.M))
    return Work(tmp_path, slurm)


def alone(folder: Path, *stages: str, **changes: object) -> Path:
    """The pool that the stages give in this process, without a Slurm."""
    words = settings(folder, base=folder / "base", pool=folder / "alone", run_dir=folder / "alone_run", **changes)
    with cores(1):
        for stage in stages:
            assert command(stage, *words).code == 0
    return folder / "alone"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool of ``LONG``, trained in this process at one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    save_tiny_base(folder / "base", tiny_causal())
    write_tasks(folder / "tasks")
    return alone(folder, "train-experts", **LONG)


def done(work: Work, job: str, seconds: float = 300.0) -> None:
    assert set(work.slurm.wait(job, seconds)) == {"COMPLETED"}, work.text("*")


def test_the_pipeline_over_two_nodes_ends_with_the_pool_of_one_machine(work: Work) -> None:
    jobs = work.submit(
        "nodes=2", "shards=2", "stages=[fetch,train-experts,train-gates,describe,index,calibrate,evaluate]"
    )
    assert list(jobs) == ["fetch", "train-experts", "train-gates", "describe", "index", "calibrate", "evaluate"]
    stages = ("train-experts", "train-gates", "describe", "index", "calibrate", "evaluate")
    pool = alone(work.folder, *stages)
    for job in jobs.values():
        done(work, job)
    assert largest_difference(adapters(pool), adapters(work.folder / "pool")) == 0.0
    for file in ("embeddings.safetensors", "calibration.json"):
        assert (work.folder / "pool/router" / file).exists()
    assert (work.folder / "run/evaluate/results.json").exists()
    nodes = {name.split("-")[1] for name in work.attempts("evaluate")[0] if name.startswith("pid-")}
    assert len(nodes) == 2
    # Ranks on both nodes must have reached it, as they may not load the model themselves.
    assert "the embedding service is ready on node" in work.text("evaluate")
    assert command("slurm", "submit", *work.settings(), f"site={work.folder / 'site.env'}", "shards=2",
                   "stages=[train-experts,train-gates]").code == 2  # fmt: skip


@pytest.mark.slow
def test_a_failing_member_of_an_array_wastes_no_other_and_is_all_that_is_submitted_again(work: Work) -> None:
    broken, kept = work.folder / "tasks/tasks/upper/train.jsonl", work.folder / "kept.jsonl"
    shutil.copy(broken, kept)
    broken.write_text("this is no example\n")
    stages = "stages=[train-experts,train-gates,describe]"
    jobs = work.submit("shards=3", stages)
    assert sorted(work.slurm.wait(jobs["train-experts"])) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert sorted(work.slurm.wait(jobs["train-gates"])) == ["CANCELLED", "COMPLETED", "COMPLETED"]
    assert work.slurm.wait(jobs["describe"]) == ["CANCELLED"]
    assert adapters(work.folder / "pool").keys() == {"copy", "last"}
    shutil.copy(kept, broken)
    jobs = work.submit("shards=3", stages)
    assert [len(work.slurm.job_states(jobs[stage])) for stage in ("train-experts", "train-gates")] == [1, 1]
    done(work, jobs["describe"])
    pool = alone(work.folder, "train-experts", "train-gates")
    assert largest_difference(adapters(pool), adapters(work.folder / "pool")) == 0.0


def test_a_job_requeued_and_then_told_to_stop_goes_on_twice_and_ends_the_same(
    work: Work, uninterrupted: Path
) -> None:
    job = work.submit("nodes=2", "stages=[train-experts]", **LONG)["train-experts"]
    work.until_in_the_middle(job, "train-experts")
    work.slurm.run("scontrol", "requeue", job)
    work.until("it goes on", lambda: "goes on after step" in work.text("train-experts"))
    work.slurm.run("scancel", "--signal=USR1", "--batch", job)
    done(work, job)
    assert work.slurm.show(job)["Restarts"] == "2"
    codes = [
        {key: code for key, code in ranks.items() if "exit" in key} for ranks in work.attempts("train-experts")
    ]
    assert codes[1:] == [{"exit-0": "85", "exit-1": "85"}, {"exit-0": "0", "exit-1": "0"}]
    assert largest_difference(adapters(uninterrupted), adapters(work.folder / "pool")) == 0.0


@pytest.mark.slow
def test_a_member_of_an_array_is_queued_again_alone(work: Work) -> None:
    job = work.submit("shards=2", "stages=[train-experts]", **LONG)["train-experts"]
    for shard in (0, 1):
        work.until_in_the_middle(f"{job}_{shard}", f"train-experts/shard-{shard}", len(HELD_IN[shard::2]))
    # The last member has the id of the array itself.
    work.slurm.run("scancel", "--signal=USR1", "--batch", f"{job}_1")
    done(work, job)
    assert [work.slurm.show(f"{job}_{shard}")["Restarts"] for shard in (0, 1)] == ["0", "1"]
    assert adapters(work.folder / "pool").keys() == set(HELD_IN)


@pytest.mark.slow
def test_submitting_again_while_members_run_waits_for_them(work: Work) -> None:
    words = ("shards=2", "stages=[train-experts]")
    first = work.submit(*words, **LONG)["train-experts"]
    work.until_in_the_middle(f"{first}_0", "train-experts/shard-0", len(HELD_IN[0::2]))
    second = work.submit(*words, **LONG)["train-experts"]
    assert f"afterany:{first}_" in work.slurm.show(second)["Dependency"]
    done(work, second)
    assert set(work.slurm.job_states(first)) == {"COMPLETED"}
    assert "being written by another job" not in work.text("train-experts")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["TERM", "USR1", "USR2"])
def test_a_signal_before_python_has_loaded_costs_a_restart_alone(work: Work, how: str) -> None:
    once = f'mkdir {work.folder}/once 2> /dev/null && kill -{how} $$; exec {sys.executable} "$@"'
    with open(work.folder / "site.env", "a") as site:
        site.write(f"PYTHON=(bash -c '{once}' rank)\n")
    job = work.submit("nodes=2", "stages=[train-experts]")["train-experts"]
    done(work, job)
    assert work.slurm.show(job)["Restarts"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("of", ["a rank", "the batch script"])
def test_a_node_that_dies_costs_the_job_a_restart_on_the_others(work: Work, uninterrupted: Path, of: str) -> None:
    job = work.submit("nodes=2", "stages=[train-experts]", **LONG)["train-experts"]
    work.until_in_the_middle(job, "train-experts")
    first = work.slurm.show(job)["BatchHost"]
    lost = first if of == "the batch script" else work.slurm.hosts(job)[1]
    work.slurm.crash(lost)
    try:
        done(work, job)
        assert lost not in work.slurm.hosts(job)
        assert largest_difference(adapters(uninterrupted), adapters(work.folder / "pool")) == 0.0
    finally:
        work.slurm.boot(lost)
        work.until("the node is back", lambda: work.slurm.states() == ["idle"] * 3)


def kill_first(program: bytes, *parts: str) -> str:
    """Kill a process of the cluster as the kernel would, by the start of its command line and what is in it or in
    its environment; returns the node it was on."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{entry}/cmdline").read_bytes()
            variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        known = line.split(b"\0") + variables
        if line.startswith(program) and all(part.encode() in known for part in parts):
            os.kill(int(entry), signal.SIGKILL)
            return next(item for item in variables if item.startswith(b"SLURMD_NODENAME=")).decode().split("=")[1]
    raise AssertionError(f"no process {program!r} {parts}")


@pytest.mark.slow
@pytest.mark.parametrize("broken", [True, False])
def test_after_a_crash_a_broken_node_is_left_out_and_without_one_the_job_ends(work: Work, broken: bool) -> None:
    job = work.submit("nodes=2", "stages=[train-experts]", **LONG)["train-experts"]
    work.until_in_the_middle(job, "train-experts")
    first = work.slurm.show(job)["BatchHost"]
    if broken:
        (work.folder / f"broken-{first}").touch()
    killed = kill_first(sys.executable.encode(), str(SLURM / "rank.py"), f"SLURM_JOB_ID={job}", "SLURM_PROCID=0")
    assert killed == first
    if not broken:
        assert work.slurm.wait(job) == ["FAILED"]
        return
    done(work, job)
    assert "goes on after step" in work.text("train-experts")
    assert work.slurm.show(job)["ExcNodeList"] == first
    assert f"node {first} is not in order" in work.text("train-experts")
    assert adapters(work.folder / "pool").keys() == set(HELD_IN)


@pytest.mark.slow
def test_a_job_that_never_gets_on_ends_after_so_many_starts(work: Work) -> None:
    with open(work.folder / "site.env", "a") as site:
        site.write("MAX_RESTARTS=1\nPYTHON=(bash -c 'kill -KILL $$')\nsite_check() { false; }\n")
    job = work.submit("stages=[train-experts]")["train-experts"]
    assert work.slurm.wait(job) == ["FAILED"]
    assert work.text("train-experts").count("is queued again") == 1
    assert "it stays ended" in work.text("train-experts")


def test_a_cancelled_job_leaves_no_process_behind(work: Work) -> None:
    words = ("train-experts", "train-gates", "describe", "index", "calibrate")
    shutil.copytree(alone(work.folder, *words), work.folder / "pool")
    job = work.submit("nodes=2", "stages=[evaluate]", evaluate__max_new_tokens=100, evaluate__queries=64)[
        "evaluate"
    ]
    work.until("ranks run", lambda: work.attempts("evaluate") and len(work.attempts("evaluate")[0]) >= 2)
    assert work.slurm.processes(str(work.folder))
    work.slurm.run("scancel", job)
    assert work.slurm.wait(job) == ["CANCELLED"]
    work.until("all are gone", lambda: not work.slurm.processes(str(work.folder)), 30)


@pytest.mark.slow
def test_deepspeeds_launcher_gives_the_same_and_its_zero_is_not_believed(work: Work) -> None:
    words = ("nodes=2", "stages=[train-experts]", "launcher=deepspeed")
    done(work, work.submit(*words)["train-experts"])
    assert largest_difference(adapters(alone(work.folder, "train-experts")), adapters(work.folder / "pool")) == 0.0
    shutil.rmtree(work.folder / "pool")
    shutil.rmtree(work.folder / "run")
    job = work.submit(*words, **LONG)["train-experts"]
    work.until_in_the_middle(job, "train-experts")
    kill_first(b"srun\0-n", f"SLURM_JOB_ID={job}")
    assert work.slurm.wait(job) == ["FAILED"]


def test_scripts_pass_shellcheck_and_slurms_own_test(work: Work) -> None:
    with open(work.folder / "site.env", "a") as site:
        site.write("GPUS_PER_NODE=8\nRANKS_PER_NODE=8\nPARTITION=main\nMEMORY=1G\nOPTIONS=(--exclusive)\n")
    tasks = ["tasks.source=jsonl", f"tasks.path={work.folder / 'tasks'}", "tasks.held_in=[]", "tasks.held_out=[]"]
    for config in [None, *sorted((SLURM.parent / "launch_configs").glob("*.yaml"))]:
        out = work.folder / "scripts"
        words = [str(config)] if config else work.settings()
        site = f"site={work.folder / 'site.env'}"
        made = command("slurm", "render", *words, *tasks, f"run_dir={out}", site, "nodes=3", "shards=2")
        assert made.code == 0, made.err
        scripts = sorted((out / "slurm").glob("*.s*"))
        assert len(scripts) >= 6
        checked = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
        for script in scripts:
            if script.suffix == ".sbatch":
                work.slurm.run("sbatch", "--test-only", str(script))
    ours = [SLURM / name for name in ("stage.sbatch", "site.env")]
    checked = subprocess.run(["shellcheck", *ours], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
