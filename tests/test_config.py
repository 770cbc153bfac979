"""Reading settings: precedence, values as they are typed, and the help that lists them all."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_jobs import command

from glider_dist.commands import COMMANDS
from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.quickstart import DEFAULTS
from glider_dist.settings import read_config, settings

LAUNCH_CONFIGS = sorted((Path(__file__).resolve().parents[1] / "launch_configs").glob("*.yaml"))


def yaml(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def test_the_command_line_beats_the_file_which_beats_the_commands_defaults_which_beat_the_dataclass(
    tmp_path: Path,
) -> None:
    file = yaml(tmp_path, "lora: {rank: 8, alpha: 2.0}\nseed: 5\n")
    cfg = read_config(
        file, ["lora.rank=4", "lora.rank=2"], {"lora.alpha": 16.0, "lora.rank": 64, "base": "elsewhere"}
    )
    assert (cfg.lora.rank, cfg.lora.alpha, cfg.seed, cfg.base) == (2, 2.0, 5, "elsewhere")
    assert cfg.train == Config().train


def test_without_file_and_overrides_every_setting_has_its_default() -> None:
    assert read_config(None, []) == Config()


@pytest.mark.parametrize("empty", ["", "# nothing but a comment\n"])
def test_an_empty_file_changes_nothing(empty: str, tmp_path: Path) -> None:
    assert read_config(yaml(tmp_path, empty), []) == Config()


def test_lists_are_typed_in_brackets_and_replace_the_default_as_a_whole() -> None:
    cfg = read_config(None, ["evaluate.routers=[base,glider]", "calibrate.alphas=[2]", "tasks.held_in=[]"])
    assert cfg.evaluate.routers == ["base", "glider"]
    assert cfg.calibrate.alphas == [2.0]
    assert cfg.tasks.held_in == []


@pytest.mark.parametrize("word", ["null", "None", "~", ""])
def test_none_is_typed_as_null_or_as_the_help_prints_it(word: str, tmp_path: Path) -> None:
    file = yaml(tmp_path, "pool: somewhere\ntasks: {limit: 3}\nrouter: {top_p: 0.5}\n")
    cfg = read_config(file, [f"pool={word}", f"tasks.limit={word}", f"router.top_p={word}"])
    assert (cfg.pool, cfg.tasks.limit, cfg.router.top_p) == (None, None, None)


def test_null_in_a_file_is_none(tmp_path: Path) -> None:
    file = yaml(tmp_path, "tasks: {limit: null}\nrun_dir:\n")
    cfg = read_config(file, [], {"tasks.limit": 4, "run_dir": "default"})
    assert (cfg.tasks.limit, cfg.run_dir) == (None, None)


@pytest.mark.parametrize("word", ["off", "Off", "false", "'off'"])
def test_off_is_understood_though_yaml_reads_a_boolean(word: str, tmp_path: Path) -> None:
    on_line = read_config(None, [f"tracking={word}", f"service.cache={word}", f"describe.cache={word}"])
    in_file = read_config(yaml(tmp_path, f"tracking: {word}\nservice:\n  cache: {word}\n"), [])
    assert [on_line.tracking, on_line.service.cache, on_line.describe.cache] == ["off"] * 3
    assert [in_file.tracking, in_file.service.cache] == ["off"] * 2


@pytest.mark.parametrize("name", ["2026_11", "007", "1e3", "12:00:00", "0x1F", "1_0.50", ".inf"])
def test_a_text_that_looks_like_a_number_stays_as_it_was_written(name: str, tmp_path: Path) -> None:
    on_line = read_config(None, [f"run_dir={name}", f"pool={name}", f"slurm.time={name}"])
    text = f"run_dir: {name}\npool: ${{run_dir}}\nslurm:\n  nodes: 0x10\n  time: {name}  # a comment\n"
    in_file = read_config(yaml(tmp_path, text), [])
    for cfg in (on_line, in_file):
        assert (cfg.run_dir, cfg.pool, cfg.slurm.time) == (name, name, name)
    assert in_file.slurm.nodes == 16


def test_a_time_in_an_anchor_or_in_braces_stays_as_it_was_written(tmp_path: Path) -> None:
    braces = read_config(yaml(tmp_path, "slurm: {time: 12:00:00, site: '007'}\n"), [])
    assert (braces.slurm.time, braces.slurm.site) == ("12:00:00", "007")
    anchor = "slurm:\n  <<: &short {time: 0:30:00}\n  nodes: 2\n"
    assert read_config(yaml(tmp_path, anchor), []).slurm.time == "0:30:00"


def test_tracking_on_is_refused_with_the_values_there_are() -> None:
    with pytest.raises(GliderError, match=r"tracking=.*must be one of offline, online, off"):
        read_config(None, ["tracking=on"])


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(GliderError, match=r"service.port is 99999, but must be a port, 0 to 65535"):
        read_config(None, ["service.port=99999"])


def test_numbers_and_booleans_are_read_as_yaml_writes_them() -> None:
    cfg = read_config(
        None, ["train.learning_rate=1e-3", "train.gradient_checkpointing=yes", "seed=007", "base=135"]
    )
    assert cfg.train.learning_rate == 1e-3
    assert cfg.train.gradient_checkpointing is True
    assert cfg.seed == 7
    assert cfg.base == "135"


def test_a_value_may_hold_equals_signs() -> None:
    assert read_config(None, ["base=a=b"]).base == "a=b"


def test_a_setting_may_refer_to_another() -> None:
    assert read_config(None, ["run_dir=here", "pool=${run_dir}/pool"]).pool == "here/pool"


@pytest.mark.parametrize(
    ("item", "needles"),
    [
        ("train.max_step=3", ["'train.max_step'", "nearest is 'train.max_steps'"]),
        ("trakking=off", ["'trakking'", "nearest is 'tracking'"]),
        ("lora.rank=abc", ["lora.rank", "int is expected", "'abc'"]),
        ("lora.rank=1.5", ["lora.rank", "int is expected", "'1.5'"]),
        ("lora.rank.deep=1", ["lora.rank", "int is expected"]),
        ("tasks.held_in=abc", ["tasks.held_in", "list of str is expected"]),
        ("base=null", ["base", "str is expected"]),
        ("train=5", ["train", "group of settings", "train.max_steps"]),
        ("tasks=null", ["tasks", "group of settings"]),
        ("pool=${nowhere}", ["pool", "nowhere"]),
        ("train.learning_rate=nan", ["train.learning_rate", "nan", "positive and finite"]),
        ("lora.rank=0", ["lora.rank is 0"]),
        ("router.top_p=1.5", ["router.top_p is 1.5"]),
        ("service.max_wait_ms=-1", ["service.max_wait_ms is -1", "not negative"]),
        ("describe.retries=-1", ["describe.retries is -1", "not negative"]),
        ("describe.temperature=-0.1", ["describe.temperature is -0.1", "not negative"]),
        ("describe.requests_per_minute=-5", ["describe.requests_per_minute is -5", "not negative"]),
        ("zero_stage=4", ["zero_stage is 4"]),
        ("joint.expert_dropout=1", ["joint.expert_dropout is 1.0"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_expected(item: str, needles: list[str]) -> None:
    with pytest.raises(GliderError) as error:
        read_config(None, [item])
    message = str(error.value)
    assert "\n" not in message
    assert all(needle in message for needle in needles), message


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        ("train:\n  max_step: 3\n", ["'train.max_step'", "'train.max_steps'"]),
        ("train:\n  max_steps: many\n", ["train.max_steps", "int is expected"]),
        ("train:\n", ["train", "group of settings"]),
        ("lora.rank: 4\n", ["lora.rank", "indented under lora:"]),
        ("- base\n", ["keys and values"]),
        ("seed: 1\nlora: [4\n", ["not valid YAML", "line 3"]),
        ("seed: 1\nseed: 2\n", ["not valid YAML", "seed", "line 2"]),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong_in_it(text: str, needles: list[str], tmp_path: Path) -> None:
    file = yaml(tmp_path, text)
    with pytest.raises(GliderError) as error:
        read_config(file, [])
    message = str(error.value)
    assert "\n" not in message
    assert all(needle in message for needle in [str(file), *needles]), message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GliderError, match=r"gone\.yaml does not exist"):
        read_config(tmp_path / "gone.yaml", [])


@pytest.mark.parametrize("name", [name for name in COMMANDS if not COMMANDS[name].own_usage])
def test_the_help_of_every_command_lists_every_setting_with_type_default_and_meaning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command(name, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    lines = outcome.out.splitlines()
    own = DEFAULTS if name == "quickstart" else {}
    for setting in settings():
        default = own.get(setting.key, setting.default)
        head = next(place for place, line in enumerate(lines) if line.startswith(f"  {setting.key}={default}  "))
        assert f"({setting.kind})" in lines[head]
        assert all(choice in lines[head] for choice in setting.choices)
        assert setting.doc
        assert lines[head + 1].strip() == setting.doc
    assert COMMANDS[name].doc in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_the_general_help_lists_every_command() -> None:
    outcome = command("--help")
    assert outcome.code == 0
    assert all(name in outcome.out and entry.doc in outcome.out for name, entry in COMMANDS.items())


def test_the_defaults_that_the_help_prints_can_be_typed_back() -> None:
    typed = [f"{setting.key}={setting.default}" for setting in settings()]
    assert read_config(None, typed) == Config()


@pytest.mark.parametrize("file", LAUNCH_CONFIGS, ids=lambda path: path.name)
def test_every_launch_configuration_is_read(file: Path) -> None:
    read_config(file, [])


def test_there_are_launch_configurations() -> None:
    assert LAUNCH_CONFIGS
