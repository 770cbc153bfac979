"""The run directory, W&B offline and the progress bar."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from glider_dist.errors import GliderError
from glider_dist.tracking.log_file import EarlyLog
from glider_dist.tracking.progress import begin_at, progress
from glider_dist.tracking.run import Run, check_run_dir, known_wandb_id

CONFIG = {"seed": 3, "train": {"max_steps": 10, "learning_rate": 5e-3}, "tasks": ["a", "b"], "pool": None}


def _start(run_dir: Path, mode: str = "off", is_main: bool = True) -> Run:
    return Run.start(run_dir, CONFIG, "train-experts", mode, is_main)


def _points(run_dir: Path) -> list[dict[str, object]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def _python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process without W&B settings of the caller."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**clean, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=Path(__file__).parents[1],
    )


def test_a_run_directory_describes_the_run(tmp_path: Path) -> None:
    run = _start(tmp_path / "deep" / "run")
    run.finish()
    assert OmegaConf.to_container(OmegaConf.load(run.run_dir / "config.yaml")) == CONFIG
    versions = json.loads((run.run_dir / "versions.json").read_text())
    assert versions["packages"]["torch"].startswith("2.")
    assert set(versions["packages"]) >= {
        "glider_dist",
        "deepspeed",
        "transformers",
        "peft",
        "datasets",
        "wandb",
    }
    assert versions["command"] == sys.argv
    assert versions["cpus"] >= 1
    assert {"python", "platform", "git", "started", "device"} <= versions.keys()
    assert not list(run.run_dir.glob(".*"))


def test_points_are_appended_as_json_lines(tmp_path: Path) -> None:
    run = _start(tmp_path)
    run.log({"loss": 2.5, "phase": "gates"}, step=1)
    run.log({"loss": np.float32(0.5), "bad": float("nan")})
    run.finish()
    first, second = _points(tmp_path)
    assert {key: first[key] for key in ("loss", "phase", "step")} == {
        "loss": 2.5,
        "phase": "gates",
        "step": 1,
    }
    assert isinstance(first["time"], float)
    assert second["loss"] == 0.5
    assert second["bad"] == "nan"
    assert "step" not in second


def test_a_restart_goes_on_with_the_same_metrics_and_log(tmp_path: Path) -> None:
    for step in (1, 2):
        run = _start(tmp_path)
        logging.getLogger("glider_dist.test").warning("start %d", step)
        run.log({"loss": 1.0}, step)
        run.finish()
    logging.getLogger("glider_dist.test").warning("after")
    assert [point["step"] for point in _points(tmp_path)] == [1, 2]
    text = (tmp_path / "log.txt").read_text()
    assert text.count("start 1") == text.count("start 2") == 1
    assert "after" not in text


def test_half_a_line_left_by_a_killed_run_is_cut_off_on_restart(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"time": 1.0, "step": 1}\n{"time": 2.0, "st')
    run = _start(tmp_path)
    run.log({"loss": 1.0}, step=2)
    run.finish()
    assert [point["step"] for point in _points(tmp_path)] == [1, 2]


def test_quantiles_are_five_keys_whatever_the_number_of_experts(tmp_path: Path) -> None:
    run = _start(tmp_path)
    run.quantiles("loss", list(range(101)), step=4)
    run.quantiles("loss", [], step=5)
    run.finish()
    (point,) = _points(tmp_path)
    point.pop("time")
    assert point == {
        "loss/min": 0.0,
        "loss/p10": 10.0,
        "loss/p50": 50.0,
        "loss/p90": 90.0,
        "loss/max": 100.0,
        "step": 4,
    }


def test_a_table_is_a_json_file(tmp_path: Path) -> None:
    run = _start(tmp_path)
    run.table("evaluate/tasks", ["task", "score"], [["a", 0.5], ["b", np.float64("nan")], ["c", None]])
    run.finish()
    written = json.loads((tmp_path / "evaluate_tasks.json").read_text(), parse_constant=pytest.fail)
    assert written == {"columns": ["task", "score"], "rows": [["a", 0.5], ["b", "nan"], ["c", None]]}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    handlers = list(logging.getLogger().handlers)
    run = _start(tmp_path / "run", mode="offline", is_main=False)
    run.log({"loss": 1.0}, step=1)
    run.quantiles("loss", [1.0, 2.0], step=1)
    run.table("tasks", ["a"], [[1]])
    run.finish()
    assert not (tmp_path / "run").exists()
    assert logging.getLogger().handlers == handlers


def test_finish_twice_and_log_afterwards_are_harmless(tmp_path: Path) -> None:
    run = _start(tmp_path)
    run.finish()
    run.finish()
    run.log({"loss": 1.0}, step=1)
    assert _points(tmp_path) == []


def test_an_unknown_mode_and_an_unwritable_directory_are_reported(tmp_path: Path) -> None:
    with pytest.raises(GliderError, match="tracking is 'on'"):
        _start(tmp_path, mode="on")
    (tmp_path / "file").write_text("")
    with pytest.raises(GliderError, match=r"run_dir .*file/run cannot be written"):
        _start(tmp_path / "file" / "run")


_RUN = """
import logging, sys
from pathlib import Path
from glider_dist.tracking.run import Run, check_run_dir

logging.basicConfig(level=logging.WARNING)
run = Run.start(Path(sys.argv[1]), {"seed": 0}, "evaluate", sys.argv[2], is_main=True)
run.log({"loss": 1.0}, step=5)
run.log({"loss": 2.0, "phase": "gates"}, step=1)
run.table("tasks", ["task", "score"], [["a", 0.5], ["b", None], ["c", "nan"]])
run.finish()
print("wandb" in sys.modules)
"""


def test_off_never_imports_wandb(tmp_path: Path) -> None:
    done = _python(_RUN, str(tmp_path), "off")
    assert done.stdout == "False\n"
    assert not (tmp_path / "wandb").exists()
    assert not (tmp_path / "wandb_id").exists()


def test_offline_records_every_point_quietly_and_a_restart_continues_the_same_wandb_run(
    tmp_path: Path,
) -> None:
    ids = []
    for _ in range(2):
        done = _python(_RUN, str(tmp_path), "offline")
        assert done.stdout == "True\n"
        assert done.stderr == ""
        ids.append((tmp_path / "wandb_id").read_text().strip())
    assert ids[0] == ids[1]
    records = list((tmp_path / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
    assert records
    # W&B drops a point whose step goes back when the step is its own; "gates" is in such a point.
    assert all(b"gates" in record.read_bytes() for record in records)
    assert len(_points(tmp_path)) == 4


def test_a_damaged_wandb_id_counts_as_none(tmp_path: Path) -> None:
    assert known_wandb_id(tmp_path) == ""
    (tmp_path / "wandb_id").write_bytes(b"\xff\xfe\x00")
    assert known_wandb_id(tmp_path) == ""


def test_two_runs_may_be_open_in_one_process(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from glider_dist.tracking.run import Run, check_run_dir

runs = [Run.start(Path(sys.argv[1]) / name, {}, name, "offline", is_main=True) for name in "ab"]
for number, run in enumerate(runs):
    run.log({"number": number})
for run in runs:
    run.finish()
"""
    _python(code, str(tmp_path))
    for number, name in enumerate("ab"):
        assert [point["number"] for point in _points(tmp_path / name)] == [number]
        assert len(list((tmp_path / name / "wandb").glob("offline-run-*"))) == 1


def test_online_without_a_login_is_one_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = _python(_RUN, str(tmp_path / "run"), "online", HOME=str(home), NETRC=str(home / "netrc"))
    assert done.stderr.count("WARNING") == 1
    assert "W&B did not start" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(_points(tmp_path / "run")) == 2


def test_a_broken_wandb_is_one_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise RuntimeError('broken install')\n")
    done = _python(_RUN, str(tmp_path / "run"), "offline", PYTHONPATH=str(tmp_path))
    assert done.stderr.count("WARNING") == 1
    assert "broken install" in done.stderr
    assert len(_points(tmp_path / "run")) == 2


def test_a_wandb_that_fails_in_the_middle_is_one_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text(
        "class Settings:\n    def __init__(self, **settings): pass\n"
        "def setup(settings): pass\n"
        "def init(**arguments): return Run()\n"
        "class Run:\n"
        "    def define_metric(self, *a, **k): pass\n"
        "    def log(self, values): raise BrokenPipeError('service is gone')\n"
    )
    done = _python(_RUN, str(tmp_path / "run"), "offline", PYTHONPATH=str(tmp_path))
    assert done.stderr.count("WARNING") == 1
    assert "service is gone" in done.stderr
    assert len(_points(tmp_path / "run")) == 2


def test_a_wandb_whose_process_is_killed_is_one_warning_and_no_traceback_at_the_end(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from pathlib import Path
from glider_dist.tracking.run import Run, known_wandb_id

run = Run.start(Path(sys.argv[1]), {}, "train-experts", "offline", is_main=True)
children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
for child in children:
    os.kill(int(child), signal.SIGKILL)
for number in range(40):
    run.log({"number": number})
    time.sleep(0.05)
run.finish()
"""
    done = _python(code, str(tmp_path))
    assert (tmp_path / "log.txt").read_text().count("W&B stopped") == 1
    assert "Traceback" not in done.stderr
    assert len(_points(tmp_path)) == 40


def test_progress_without_a_terminal_prints_few_whole_lines() -> None:
    printed = _python("""
from glider_dist.tracking.log_file import EarlyLog
from glider_dist.tracking.progress import progress
for _ in progress(range(5000), desc="batches"):
    pass
""").stderr
    assert "\r" not in printed
    lines = printed.splitlines()
    assert 1 <= len(lines) <= 2
    assert "batches" in lines[-1]
    assert "5000/5000" in lines[-1]


def test_progress_disabled_prints_nothing_and_passes_items_through(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(progress([1, 2, 3], enabled=False)) == [1, 2, 3]
    bar = progress(total=2, enabled=False)
    bar.update(1)
    bar.close()
    assert capsys.readouterr().err == ""


def test_the_speed_of_a_resumed_job_is_that_of_this_start() -> None:
    with progress(total=1000) as bar:
        bar.mininterval = 0.0
        begin_at(bar, 900)
        time.sleep(0.1)
        bar.update()
        assert (bar.n, bar.initial) == (901, 900)
        assert bar.format_dict["rate"] < 100


def test_what_was_logged_before_the_run_directory_opened_is_in_its_log(tmp_path):
    root = logging.getLogger()
    early = EarlyLog()
    root.addHandler(early)
    try:
        logging.getLogger("glider_dist.model").warning("before the run")
        run = Run.start(tmp_path / "run", CONFIG, "evaluate", "off", True, {"dtype": "float32"})
        logging.getLogger("glider_dist.model").warning("within the run")
        run.finish()
        assert early not in root.handlers
    finally:
        root.removeHandler(early)
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.split(": ")[1] for line in lines] == ["before the run", "within the run"]
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["compute"] == {"dtype": "float32"}


def test_a_run_directory_is_checked_without_being_made(tmp_path):
    (tmp_path / "file").write_text("")
    check_run_dir(tmp_path / "new" / "run")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(GliderError, match=r"run_dir .* cannot be written .*file is no folder"):
            check_run_dir(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(GliderError, match="no permission to write"):
        check_run_dir(tmp_path / "run")


_WANDB = """
import json, os
class Settings:
    def __init__(self, **settings): pass
def setup(settings): pass
def init(**arguments):
    note(**{key: arguments[key] for key in ("project", "name", "job_type")})
    return Run()
def note(**what):
    with open(os.environ["NOTES"], "a") as file: file.write(json.dumps(what) + "\\n")
class Run:
    summary = {}
    def define_metric(self, *a, **k): pass
    def mark_preempting(self): note(preempting=True)
    def finish(self, exit_code): note(exit_code=exit_code, **self.summary)
"""
_ENDS = """
import sys
from pathlib import Path
from glider_dist.tracking.run import Run
Run.start(Path(sys.argv[1]), {}, "evaluate", "offline", is_main=True).finish(*sys.argv[2:])
"""


def _told_to_wandb(folder: Path, *ending: str, **environment: str) -> list[dict[str, object]]:
    (folder / "wandb.py").write_text(_WANDB)
    notes = folder / "notes"
    notes.write_text("")
    environment |= {"PYTHONPATH": str(folder), "NOTES": str(notes)}
    assert _python(_ENDS, str(folder / "exp7"), *ending, **environment).stderr == ""
    return [json.loads(line) for line in notes.read_text().splitlines()]


def test_wandb_is_told_how_a_run_ended(tmp_path: Path) -> None:
    start = {"project": "glider_dist", "name": "evaluate exp7", "job_type": "evaluate"}
    done = {"exit_code": 0, "state": "done", "reason": ""}
    assert _told_to_wandb(tmp_path) == [start, done]
    failed = {"exit_code": 1, "state": "failed", "reason": "boom"}
    assert _told_to_wandb(tmp_path, "failed", "boom") == [start, failed]
    stopped = {"exit_code": 1, "state": "stopped", "reason": "SIGUSR1"}
    assert _told_to_wandb(tmp_path, "stopped", "SIGUSR1") == [start, {"preempting": True}, stopped]


def test_wandbs_own_variables_count(tmp_path: Path) -> None:
    start, _ = _told_to_wandb(tmp_path, WANDB_PROJECT="ours", WANDB_NAME="first", WANDB_JOB_TYPE="nightly")
    assert start == {"project": "ours", "name": "first", "job_type": "nightly"}
    assert _told_to_wandb(tmp_path, WANDB_MODE="disabled") == []
