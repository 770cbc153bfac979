"""What Slurm is told and what it tells, without a Slurm: host lists, meeting places, the chain, the scripts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_jobs import command, settings, write_tasks

from glider_dist.errors import GliderError
from glider_dist.parallel.launch import adopt_slurm, first_host, port_of, tasks_per_node, visible_gpu
from glider_dist.planning.slurm_script import Site
from glider_dist.testing import random_pool, save_tiny_base, tiny_causal

REPOSITORY = Path(__file__).resolve().parents[1]
STEP = {
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[03-04,9]-ib[0-1]", "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2", "SLURM_NTASKS": "9",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("node1", "node1"),
        ("node[2-4]", "node2"),
        ("gpu[03-05,9],login", "gpu03"),
        ("a,b[1-2]", "a"),
        ("rack[1,3]-n[07-09].site", "rack1-n07.site"),
    ],
)
def test_the_first_host_of_a_host_list_is_where_ranks_meet(text: str, wanted: str) -> None:
    assert first_host(text) == wanted


def test_task_counts_are_read_for_each_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_a_task_of_srun_learns_its_rank_and_where_to_meet() -> None:
    env = dict(STEP)
    adopt_slurm(env)
    assert {key: env[key] for key in env.keys() - STEP.keys()} == {
        "RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu03-ib0",
        "MASTER_PORT": str(port_of(77, 2)),
    }  # fmt: skip


@pytest.mark.parametrize("change", [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_rank_of_another_launcher_and_a_lone_task_are_left_alone(change: dict[str, str]) -> None:
    env = {**STEP, **change}
    adopt_slurm(env)
    assert env == {**STEP, **change}


def test_the_batch_script_itself_is_no_rank() -> None:
    env = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}
    adopt_slurm(env)
    assert "RANK" not in env


@pytest.mark.parametrize("change", [{"SLURM_STEP_NODELIST": "[]"}, {"SLURM_NODEID": "7"}, {"SLURM_JOB_ID": "x"}])
def test_variables_that_are_not_slurms_are_refused_in_one_sentence(change: dict[str, str]) -> None:
    with pytest.raises(GliderError, match="SLURM_"):
        adopt_slurm({**STEP, **change})


@given(st.integers(1, 10**8), st.integers(1, 4000), st.integers(0, 4), st.integers(0, 4))
def test_jobs_on_one_node_and_steps_of_one_job_meet_at_different_ports(
    job: int, apart: int, step: int, other: int
) -> None:
    ports = [port_of(job, step), port_of(job + apart, other)]
    assert ports[0] != ports[1]
    assert all(1024 < port < 32768 for port in ports)
    assert (port_of(job, step) == port_of(job, other)) == (step == other)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    save_tiny_base(tmp_path / "base", tiny_causal())
    write_tasks(tmp_path / "tasks")
    return tmp_path


def slurm(job: Path, *words: str) -> dict[str, str]:
    """Scripts by name, as the command prints them."""
    done = command("slurm", words[0], *settings(job, base=job / "base"), *words[1:], "--dry-run")
    assert done.code == 0, done.err
    parts = done.out.split("==> ")[1:]
    return {Path(head).name: text for head, _, text in (part.partition(" <==\n") for part in parts)}


def test_the_chain_waits_member_for_member_and_then_for_all(job: Path) -> None:
    scripts = slurm(job, "submit", "shards=3", "nodes=2")
    assert list(scripts) == [
        "train-experts.sbatch", "train-gates.sbatch", "describe.sbatch", "index.sbatch", "calibrate.sbatch",
        "evaluate.sbatch", "submit.sh",
    ]  # fmt: skip
    waits = [line.split()[2:3] for line in scripts["submit.sh"].splitlines() if line.startswith("submit ")]
    kinds = [word[0].split("--dependency=")[-1].split(":")[0] if word else "" for word in waits]
    assert kinds == ["afterany", "aftercorr", "afterok", "afterok", "afterok", "afterok"]
    assert "#SBATCH --array=0,1,2\n" in scripts["train-gates.sbatch"]
    assert "#SBATCH --nodes=2\n" in scripts["evaluate.sbatch"]
    assert "#SBATCH --nodes=1\n" in scripts["describe.sbatch"]
    assert "GLIDER_SERVICE=yes\n" in scripts["evaluate.sbatch"]
    assert "GLIDER_GROUP=run\n" in scripts["train-gates.sbatch"]
    forced = slurm(job, "submit", "nodes=2", "service.fallback=false")
    assert "GLIDER_SERVICE=must\n" in forced["evaluate.sbatch"]
    assert "GLIDER_SERVICE=no\n" in scripts["train-gates.sbatch"]
    assert not (job / "run").exists()
    assert "--array" not in slurm(job, "submit", "shards=1")["train-experts.sbatch"]


def test_shards_that_the_pool_has_are_left_out(job: Path) -> None:
    # copy (0) is done, upper (1) has no gate, last (2) is missing.
    random_pool(job / "pool", tiny_causal(), ["copy"])
    random_pool(job / "pool", tiny_causal(), ["upper"], gates=False)
    scripts = slurm(job, "render", "shards=3")
    assert "#SBATCH --array=1,2\n" in scripts["train-experts.sbatch"]
    assert "#SBATCH --array=1,2\n" in scripts["train-gates.sbatch"]
    assert "GLIDER_SHARDS=3\n" in scripts["train-experts.sbatch"]
    random_pool(job / "pool2", tiny_causal(), ["copy", "upper", "last"])
    assert list(slurm(job, "render", f"pool={job / 'pool2'}", "stages=[train-experts,evaluate]")) == [
        "evaluate.sbatch",
        "submit.sh",
    ]


@pytest.mark.parametrize(
    ("earlier", "kept", "later"),
    [(3, "shard-2/checkpoints", 2), (3, "shard-0/checkpoints", 1), (1, "checkpoints", 3)],
)
def test_unfinished_training_is_not_dropped_by_another_number_of_shards(
    job: Path, earlier: int, kept: str, later: int
) -> None:
    words = ["slurm", "render", "stages=[train-experts]", *settings(job, base=job / "base")]
    assert command(*words, f"shards={earlier}").code == 0
    assert command(*words, f"shards={later}").code == 0, "nothing has been trained"
    assert command(*words, f"shards={earlier}").code == 0
    step = job / "run/train-experts" / kept / "expert/copy/step-00000010.safetensors"
    step.parent.mkdir(parents=True)
    step.touch()
    done = command(*words, f"shards={later}")
    assert done.code == 2
    assert f"unfinished training of shards={earlier}" in done.errors[0]
    assert command(*words, f"shards={earlier}").code == 0
    step.unlink()
    assert command(*words, f"shards={later}").code == 0


def test_the_checkpoints_and_not_the_last_script_tell_of_how_many_shards_they_are(job: Path) -> None:
    words = ["slurm", "render", "stages=[train-experts]", *settings(job, base=job / "base")]

    def keep(shard: str) -> Path:
        member = job / f"run/train-experts/shard-{shard.split('/')[0]}"
        step = member / "checkpoints/expert/copy/step-00000010.safetensors"
        step.parent.mkdir(parents=True)
        step.touch()
        (member / "config.yaml").write_text(f"tasks:\n  shard: {shard}\n")
        return step

    assert command(*words, "shards=2").code == 0
    step = keep("1/3")
    done = command(*words, "shards=2")
    assert done.code == 2
    assert "use shards=3" in done.errors[0]
    assert command(*words, "shards=3").code == 0
    # Of several numbers none goes on with all.
    keep("0/2")
    for shards in (2, 3):
        done = command(*words, f"shards={shards}")
        assert done.code == 2
        assert f"shards=3 ({step.parents[2]})" in done.errors[0]
        assert "use shards=" not in done.errors[0]


def test_settings_of_the_site_become_options_of_sbatch(job: Path) -> None:
    text = (REPOSITORY / "slurm/site.env").read_text()
    for line in (
        "PARTITION=gpu", "ACCOUNT='my lab'", "GPUS_PER_NODE=4", "RANKS_PER_NODE=4", "FETCH_PARTITION=login",
        "OPTIONS=(--exclusive --reservation=x)",
    ):  # fmt: skip
        text += line + "\n"
    (job / "mine.env").write_text(text)
    scripts = slurm(job, "render", f"site={job / 'mine.env'}", "stages=[fetch,evaluate]", "time=30")
    lines = [
        line.removeprefix("#SBATCH ") for line in scripts["evaluate.sbatch"].splitlines() if "#SBATCH" in line
    ]
    wanted = {"--partition=gpu", '"--account=my lab"', "--gpus-per-node=4", "--ntasks-per-node=4", "--exclusive"}
    assert wanted | {"--reservation=x", "--time=30"} <= set(lines)
    assert "#SBATCH --partition=login\n" in scripts["fetch.sbatch"]


@pytest.mark.parametrize(
    ("site", "wanted"),
    [
        ("", ["--mem=900G", "--partition=gpu", "--qos=long", "--constraint=h100", "--exclusive"]),
        ("FETCH_PARTITION=login\nFETCH_OPTIONS=(--mem=8G)", ["--partition=login", "--mem=8G"]),
        ("FETCH_PARTITION=login\nunset FETCH_OPTIONS", ["--partition=login"]),
        (
            "FETCH_OPTIONS=(--mem=8G)",
            ["--mem=900G", "--partition=gpu", "--qos=long", "--constraint=h100", "--exclusive", "--mem=8G"],
        ),
    ],
)
def test_fetch_has_its_own_options_and_on_its_own_partition_nothing_that_the_other_nodes_have(
    job: Path, site: str, wanted: list[str]
) -> None:
    others = "PARTITION=gpu\nQOS=long\nCONSTRAINT=h100\nMEMORY=900G\nACCOUNT=lab\nOPTIONS=(--exclusive)\n"
    (job / "mine.env").write_text((REPOSITORY / "slurm/site.env").read_text() + others + site)
    script = slurm(job, "render", f"site={job / 'mine.env'}", "stages=[fetch]")["fetch.sbatch"]
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH --")]
    asked = ("--mem", "--partition", "--qos", "--constraint", "--exclusive")
    assert [line for line in lines if line.startswith(asked)] == wanted
    assert "--account=lab" in lines


@pytest.mark.parametrize(
    ("scancel", "sentence"),
    [("exit 0", "nothing stays submitted"), ("exit 1", "the jobs that it names above may stay submitted")],
)
def test_a_refused_submission_says_whether_jobs_stay(
    job: Path, monkeypatch: pytest.MonkeyPatch, scancel: str, sentence: str
) -> None:
    refused = 'case "$*" in *train-gates.sbatch*) exit 1 ;; esac; echo 7'
    for name, text in (("sbatch", refused), ("scancel", scancel)):
        (job / name).write_text(f"#!/bin/bash\n{text}\n")
        (job / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{job}:{os.environ['PATH']}")
    done = command("slurm", "submit", *settings(job, base=job / "base"))
    assert done.code == 2
    assert sentence in done.errors[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run"], "slurm does render and submit"),
        (["render", "stages=[train-expert]"], "slurm.stages names 'train-expert'"),
        (["render", "site=nowhere.env"], "the site file"),
        (["render", "node=2"], "unknown key 'node'"),
        (["render", "scripts=."], "has no stage.sbatch"),
        (["render", "tasks.shard=0/2"], "use shards=N"),
        (["render", "nodes=0"], "slurm.nodes is 0"),
    ],
)
def test_a_wrong_order_to_slurm_is_refused_before_anything_is_written(
    job: Path, words: list[str], sentence: str
) -> None:
    done = command("slurm", *words, *settings(job, base=job / "base"))
    assert done.code == 2
    assert sentence in done.errors[0]
    assert not (job / "run").exists()


def test_a_site_file_that_is_no_bash_or_lacks_a_setting_is_refused(job: Path) -> None:
    for text, sentence in (("PARTITION=(\n", "cannot be read by bash"), ("PARTITION=x\n", "unbound variable")):
        (job / "site.env").write_text(text)
        done = command("slurm", "render", f"site={job / 'site.env'}", *settings(job, base=job / "base"))
        assert done.code == 2
        assert sentence in done.errors[0]


def test_what_a_site_file_prints_is_no_setting(tmp_path: Path) -> None:
    text = (REPOSITORY / "slurm/site.env").read_text()
    (tmp_path / "site.env").write_text(f"echo loading modules\n{text}PARTITION=gpu\n")
    assert Site.read(tmp_path / "site.env").values["PARTITION"] == "gpu"


def test_words_reach_the_stage_as_they_were_typed(job: Path) -> None:
    odd = "describe_file=it's $HOME; a file.txt"
    script = slurm(job, "render", odd)["evaluate.sbatch"]
    start = script.index("set -- ")
    shown = subprocess.run(
        ["bash", "-c", script[start : script.index("\nscripts=")] + '\nprintf "%s\\0" "$@"'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    assert shown[0] == "evaluate"
    assert odd in shown
    assert f"run_dir={job / 'run' / 'evaluate'}" in shown


def test_jobs_read_the_configuration_as_it_was_when_they_were_submitted(job: Path) -> None:
    file = job / "mine.yaml"
    for steps in (5, 7):
        file.write_text(f"train:\n  max_steps: {steps}\n")
        done = command("slurm", "render", str(file), *settings(job, base=job / "base"))
        assert done.code == 0, done.err
    scripts = job / "run/slurm"
    (named,) = set(re.findall(r"config-\S+\.yaml", (scripts / "evaluate.sbatch").read_text()))
    file.write_text("train:\n  max_steps: 9\n")
    assert f"evaluate {scripts / named} " in (scripts / "evaluate.sbatch").read_text()
    kept = {path.name: path.read_text() for path in scripts.glob("config-*")}
    assert kept[named].endswith("max_steps: 7\n")
    # Jobs of the submission before may still be queued.
    assert len(kept) == 2


@pytest.mark.parametrize(("shard", "wanted"), [("0/2", ["copy", "last"]), ("1/2", ["upper"]), ("4/5", [])])
def test_a_shard_trains_its_own_tasks_and_none_is_fine(job: Path, shard: str, wanted: list[str]) -> None:
    words = settings(job, base=job / "base", tasks__shard=shard, train__max_steps=2, train__gate_steps=2)
    assert command("train-experts", *words).code == 0
    experts = job / "pool" / "experts"
    assert sorted(path.name for path in experts.glob("[!.]*")) == wanted
    if wanted:
        assert command("train-gates", *words).code == 0
        assert all((experts / name / "gate.safetensors").exists() for name in wanted)


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_a_shard_that_is_none_is_refused(job: Path, shard: str) -> None:
    done = command("train-experts", *settings(job, base=job / "base", tasks__shard=shard))
    assert done.code == 2
    assert "must be i/n" in done.errors[0]


def test_fetch_finds_what_a_configuration_names_and_says_what_is_missing(job: Path) -> None:
    done = command("fetch", *settings(job, base=job / "base"))
    assert done.code == 0, done.err
    assert "tasks: 4 with 70 examples" in done.err
    assert not (job / "run").exists()
    shutil.rmtree(job / "base")
    assert command("fetch", *settings(job, base=job / "base")).code == 2


def test_a_rank_takes_the_gpu_of_its_place_or_the_only_one_that_slurm_shows_it():
    env = {"RANK": "7", "LOCAL_RANK": "3", "SLURM_GPUS_ON_NODE": "4"}
    assert visible_gpu(env, 3, 4, visible=4) == 3
    assert env["LOCAL_RANK"] == "3"
    assert visible_gpu(env, 3, 4, visible=1) == 0
    assert env["LOCAL_RANK"] == "0"
    for on_node in ("1", ""):
        with pytest.raises(GliderError, match=r"rank 7 needs GPU 3 of its node, but sees 1; .*--gpu-bind"):
            visible_gpu({"RANK": "7", "SLURM_GPUS_ON_NODE": on_node}, 3, 4, visible=1)
