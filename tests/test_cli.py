"""The command line itself: how words are sorted, and with which code a process ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_jobs import HELD_IN, command, finish, program, settings, snapshot, start, write_tasks

import glider_dist
from glider_dist import cli
from glider_dist.cli import main, parse
from glider_dist.commands import COMMANDS, Command
from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.job import with_base
from glider_dist.parallel.stopping import SIGNALS
from glider_dist.settings import read_config
from glider_dist.testing import random_pool, save_tiny_base, tiny_causal


def test_words_are_sorted_into_command_file_settings_and_text() -> None:
    found = parse(["predict", "job.yaml", "Say this. Input: a=b", "seed=3", "pool=some folder"])
    assert found.command == "predict"
    assert found.file == Path("job.yaml")
    assert found.overrides == ["seed=3", "pool=some folder"]
    assert found.text == "Say this. Input: a=b"


def test_a_setting_may_name_a_yaml_file() -> None:
    found = parse(["evaluate", "base=odd.yaml"])
    assert (found.file, found.overrides) == (None, ["base=odd.yaml"])


@pytest.mark.parametrize("word", ["--local_rank=1", "--local-rank=1"])
def test_what_a_launcher_adds_is_ignored(word: str) -> None:
    found = parse([word, "evaluate", "seed=3"])
    assert (found.command, found.overrides) == ("evaluate", ["seed=3"])


@pytest.mark.parametrize("words", [["--ranks", "3"], ["--ranks=3"]])
def test_flags_take_their_value_in_either_form(words: list[str]) -> None:
    found = parse(["quickstart", *words, "--fresh"])
    assert (found.ranks, found.fresh, found.help) == (3, True, False)


@pytest.mark.parametrize("words", [["--ranks"], ["--ranks=0"], ["--ranks", "-1"], ["--rank=2"], ["-x"]])
def test_a_wrong_flag_is_refused(words: list[str]) -> None:
    with pytest.raises(GliderError, match=r"--ranks|unknown flag"):
        parse(["quickstart", *words])


def test_two_texts_are_refused() -> None:
    with pytest.raises(GliderError, match="'one' stands before -- and 'two' behind it"):
        parse(["predict", "one", "--", "two"])
    with pytest.raises(GliderError, match="'another text'"):
        parse(["predict", "one text", "another text"])


def test_the_command_line_answers_without_loading_torch(tmp_path: Path) -> None:
    code = "import sys; from glider_dist.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for words in (["--help"], ["train-experts", "--help"], ["train-expert"], ["evaluate", "sede=3"]):
        done = finish(start([sys.executable, "-c", code, *words], tmp_path))
        assert done.out.splitlines()[-1] == "False", words


def test_every_public_name_is_there() -> None:
    assert set(glider_dist.__all__) <= set(dir(glider_dist))
    assert all(hasattr(glider_dist, name) for name in glider_dist.__all__)
    with pytest.raises(AttributeError, match="attach_pol"):
        _ = glider_dist.attach_pol


def test_without_a_command_the_usage_is_printed_and_the_code_is_2() -> None:
    outcome = command()
    assert outcome.code == 2
    assert outcome.out.startswith("usage: glider-dist COMMAND")


def test_an_interruption_ends_with_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_main", interrupted)
    assert main([]) == 130


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_an_open_file_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(argv: list[str]) -> int:
        with open("/dev/full", "w") as file:
            file.write("x")
        return 0

    monkeypatch.setattr(cli, "_main", write)
    assert main([]) == 2
    assert "(No space left on device); make room and give the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_stage_is_being_loaded_ends_with_code_85(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(target: str) -> object:
        signal.raise_signal(number)
        raise AssertionError("it went on")

    monkeypatch.setattr(cli, "_load", load)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate"])
    assert stop.value.code == 85
    assert signal.getsignal(number) is before


def test_an_error_that_is_not_the_users_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "evaluate", Command("no_such_module:run", "broken on purpose"))
    with pytest.raises(ModuleNotFoundError):
        command("evaluate")


@pytest.mark.parametrize("stage", COMMANDS)
def test_every_command_names_a_function_that_exists(stage: str) -> None:
    module, _, function = COMMANDS[stage].target.partition(":")
    __import__(module)
    assert callable(getattr(sys.modules[module], function))


def test_starting_over_deletes_nothing_but_a_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    before = snapshot(tmp_path)
    outcome = command("quickstart", "--fresh", "run_dir=thesis")
    assert outcome.code == 2
    assert "thesis, which does not look like a run directory" in outcome.errors[0]
    assert snapshot(tmp_path) == before


def test_starting_over_does_not_reach_a_pool_elsewhere_before_a_mistake_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random_pool(tmp_path / "run" / "pool", tiny_causal(), experts=1)
    before = snapshot(tmp_path)
    assert command("quickstart", "--fresh", "run_dir=run", "sed=1").code == 2
    assert snapshot(tmp_path) == before


def test_a_process_prints_the_answer_to_stdout_or_one_sentence_to_stderr(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", tiny_causal())
    random_pool(tmp_path / "pool", tiny_causal(), experts=HELD_IN)
    write_tasks(tmp_path / "tasks")
    text = "Repeat the words. Input: sun river"
    arguments = ["predict", text, *settings(tmp_path, base=base, router__kind="phatgoose")]
    right = finish(start([sys.executable, "-m", "glider_dist", *arguments], tmp_path))
    assert right.code == 0, right.err
    lines = right.out.splitlines()
    assert lines[0] == f"query:  {text}"
    assert lines[1].startswith("answer: ")
    assert any(line.startswith(f"  {name}: ") for line in lines[2:] for name in HELD_IN)
    wrong = finish(start([program("glider-dist"), *arguments, "router.kind=oracle"], tmp_path))
    assert wrong.code == 2
    assert len(wrong.errors) == 1
    assert "Traceback" not in wrong.err
    assert wrong.out == ""


def test_the_record_of_a_run_begins_with_the_base_its_dtype_and_its_device(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", tiny_causal())
    random_pool(tmp_path / "pool", tiny_causal(), experts=HELD_IN)
    write_tasks(tmp_path / "tasks")
    words = settings(tmp_path, base=base, evaluate__routers="[base]", evaluate__queries=1)
    outcome = command("evaluate", *words)
    assert outcome.code == 0, outcome.err
    # The run directory is opened last here, when the table is written.
    assert f"base {base} on cpu, float32: asked for" in (tmp_path / "run" / "log.txt").read_text()
    compute = json.loads((tmp_path / "run" / "versions.json").read_text())["compute"]
    alone = {"ranks": 1, "ranks_per_node": 1}
    assert compute == {"device": "cpu", "dtype": "float32", "dtype_reason": "float32: asked for", **alone}


def test_a_text_is_answered_where_no_run_can_be_recorded(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", tiny_causal())
    random_pool(tmp_path / "pool", tiny_causal(), experts=HELD_IN)
    words = settings(tmp_path, base=base, router__kind="phatgoose", run_dir=base / "config.json")
    assert command("predict", "Repeat the words. Input: sun", *words).code == 0


def test_without_base_a_stage_takes_the_one_that_the_pool_was_made_for(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", tiny_causal())
    random_pool(tmp_path / "pool", tiny_causal(), experts=HELD_IN, base=str(base))
    write_tasks(tmp_path / "tasks")
    words = settings(tmp_path, router__kind="phatgoose", evaluate__routers="[base]", evaluate__queries=1)
    for stage in (["predict", "Repeat the words. Input: sun"], ["evaluate"], ["plan", "plan.stages=[evaluate]"]):
        outcome = command(*stage, *words)
        assert outcome.code == 0, outcome.err
        assert f"base {base}: pool {tmp_path / 'pool'} was made for it" in outcome.err
    assert f"base:    {base}," in outcome.out
    assert f"base: {base}\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_base_that_has_moved_is_told_with_the_file_that_names_it(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", tiny_causal())
    random_pool(tmp_path / "pool", tiny_causal(), experts=HELD_IN, base=str(base))
    base.rename(tmp_path / "moved")
    outcome = command("predict", "Repeat the words. Input: sun", *settings(tmp_path, router__kind="phatgoose"))
    assert outcome.code == 2
    assert f"pool.json names '{base}' as the pool's base; if that moved, give base=FOLDER" in outcome.errors[0]


def test_a_base_that_is_named_is_not_exchanged_for_the_pools(tmp_path: Path) -> None:
    other = save_tiny_base(tmp_path / "other", tiny_causal(hidden_size=32))
    random_pool(tmp_path / "pool", tiny_causal(), experts=HELD_IN, base="right")
    outcome = command("predict", "Repeat", *settings(tmp_path, base=other, router__kind="phatgoose"))
    assert outcome.code == 2
    assert "leave base= out, or give base=right" in outcome.errors[0]


def test_a_new_pool_is_for_the_base_that_needs_no_network(tmp_path: Path) -> None:
    cfg = read_config(None, [f"pool={tmp_path / 'pool'}"])
    assert with_base(cfg).base == with_base(Config()).base == "smollm2-135m"
    assert cfg.base == Config().base


@pytest.mark.parametrize("damage", ["[]", "null", "{", "{}", None])
def test_a_damaged_row_of_an_earlier_evaluation_is_made_again(damage: str | None, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", tiny_causal())
    random_pool(tmp_path / "pool", tiny_causal(), experts=HELD_IN)
    write_tasks(tmp_path / "tasks")
    words = settings(tmp_path, base=base, evaluate__routers="[base]", evaluate__queries=1)
    first = command("evaluate", *words)
    row = tmp_path / "run" / "rows" / "base.json"
    whole = json.loads(row.read_text())
    row.write_text(damage if damage is not None else json.dumps({"key": whole["key"]}))
    assert command("evaluate", *words).code == first.code == 0
    assert json.loads(row.read_text())["result"]["queries"] == whole["result"]["queries"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["Explain docker-compose.yml"], "Explain docker-compose.yml"),
        (["-5 plus 3?"], "-5 plus 3?"),
        (["seed=3", "--", "x=3"], "x=3"),
        (["--", "-h", "help"], "-h help"),
        (["--", "--local_rank is a flag"], "--local_rank is a flag"),
        ([f"{'long ' * 100}.yaml"], f"{'long ' * 100}.yaml"),
    ],
)
def test_a_text_may_look_like_a_file_a_flag_or_a_setting(words: list[str], text: str) -> None:
    found = parse(["predict", *words])
    assert (found.text, found.file, found.help) == (text, None, False)


def test_a_configuration_file_may_have_a_blank_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "my job.yaml").write_text("seed: 3\n")
    assert parse(["evaluate", str(tmp_path / "my job.yaml")]).file == tmp_path / "my job.yaml"


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    code = "import sys; from glider_dist.cli import main; sys.exit(main(['evaluate', '--help']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert "Traceback" not in said
    assert process.wait() == 141
