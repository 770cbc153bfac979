"""The command line: ``glider-dist COMMAND [CONFIG.yaml] [key=value ...]``.

Exit codes: 0 done; 1 an unexpected error; 2 bad input (one sentence says what); 85 stopped as asked, by SIGTERM,
SIGUSR1, SIGUSR2 or max_minutes: what is done is kept, and the same command goes on; 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import select
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from glider_dist.commands import COMMANDS
from glider_dist.config import Config
from glider_dist.errors import EXIT_STOPPED, GliderError, Stopped
from glider_dist.mistakes import tell, told_elsewhere
from glider_dist.parallel.launch import adopt_slurm
from glider_dist.parallel.stopping import StopWish, signals_to
from glider_dist.settings import read_config, settings
from glider_dist.tracking.log_file import EarlyLog

log = logging.getLogger("glider_dist")
# Of a disk or a path, not of the program.
_UNWRITABLE = (
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
)


USAGE = """usage: glider-dist COMMAND [CONFIG.yaml] [key=value ...] [FLAGS]
       deepspeed --num_gpus N --module glider_dist COMMAND [CONFIG.yaml] [key=value ...]

flags:
  --ranks N      how many ranks quickstart and bench dispatch|joint start, or plan and --dry-run plan for
  --fresh        quickstart starts over
  --dry-run      plan a stage instead of running it; print what slurm submit or pool import would do
  --help         what a command does, and every setting
"""


@dataclass
class Arguments:
    """What was typed, sorted."""

    command: str
    file: Path | None = None
    overrides: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    ranks: int | None = None
    fresh: bool = False
    dry_run: bool = False
    help: bool = False

    @property
    def text(self) -> str | None:
        """The text of a command that takes one."""
        return self.words[0] if self.words else None


def parse(argv: Sequence[str]) -> Arguments:
    """Sort the arguments.

    Raises:
        GliderError: an unknown command or flag, or a stray argument.
    """
    given = list(argv)
    end = given.index("--") if "--" in given else len(given)
    # What follows is text, whatever it looks like.
    text = [" ".join(given[end + 1 :])] if end < len(given) else []
    # The deepspeed launcher inserts --local_rank=N before the command; the environment says the same.
    words = [word for word in given[:end] if not word.startswith(("--local_rank", "--local-rank"))]
    arguments = Arguments("")
    flags = iter(words)
    for word in flags:
        name, _, value = word.partition("=")
        if word in ("--help", "-h"):
            arguments.help = True
        elif word == "--fresh":
            arguments.fresh = True
        elif word == "--dry-run":
            arguments.dry_run = True
        elif name == "--ranks":
            value = value or next(flags, "")
            if not value.isdigit() or int(value) < 1:
                raise GliderError(f"--ranks needs a number of processes, not {value!r}")
            arguments.ranks = int(value)
        elif word.startswith("-") and " " not in name:
            raise GliderError(f"unknown flag {word}; the flags are --ranks N, --fresh, --dry-run and --help")
        elif not arguments.command:
            arguments.command = word
        elif word.endswith((".yaml", ".yml")) and arguments.file is None and "=" not in word and _is_file(word):
            arguments.file = Path(word)
        elif "=" in word and word.split("=")[0].replace("_", "").replace(".", "").isalnum() and " " not in name:
            arguments.overrides.append(word)
        elif not arguments.words or (arguments.command in COMMANDS and COMMANDS[arguments.command].own_usage):
            arguments.words.append(word)
        else:
            raise GliderError(f"{word!r} is neither a configuration file nor key=value")
    if text and arguments.words:
        raise GliderError(f"{arguments.words[0]!r} stands before -- and {text[0]!r} behind it; give one text")
    arguments.words += text
    return arguments


def _is_file(word: str) -> bool:
    """Whether a word that ends like a configuration file is one: a text may end so, too."""
    return " " not in word or os.path.exists(word)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``glider-dist`` and ``python -m glider_dist``; returns the exit code."""
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except GliderError as error:
        mistake = str(error)
    except Stopped:
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 128 + signal.SIGPIPE
        # A collective breaks when another rank leaves it because of a mistake, which that rank has told.
        if told_elsewhere():
            return 2
        if not isinstance(error, OSError) or error.errno not in _UNWRITABLE:
            raise
        if error.filename is not None:
            mistake = f"{error.filename} cannot be used ({error.strerror})"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):  # a write to an open file does not say to which
            mistake = f"a file cannot be written ({error.strerror}); make room and give the same command again"
        else:
            raise
    # Here, where the error's frames, which hold the connections to the other ranks, are gone.
    return tell(mistake)


def _reader_is_gone() -> bool:
    """Whether who read the output has closed it, as head does; what is still to come goes nowhere then."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if not watch.poll(0):  # errors are told unasked
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _main(argv: list[str]) -> int:
    arguments = parse(argv)
    command = COMMANDS.get(arguments.command)
    if arguments.help or not arguments.command:
        print(_help(arguments.command))
        return 0 if arguments.help else 2
    if command is None:
        raise GliderError(f"unknown command {arguments.command!r}; the commands are {', '.join(COMMANDS)}")
    if arguments.text is not None and not command.takes_text and not command.own_usage:
        raise GliderError(f"{arguments.text!r} is neither a configuration file nor key=value")
    if arguments.dry_run and arguments.command in ("bench", "runs"):
        raise GliderError(
            "--dry-run belongs to stages that plan knows, slurm submit and pool import, not to "
            f"{arguments.command}"
        )
    plans = arguments.command == "plan" or (arguments.dry_run and not command.own_usage)
    if arguments.fresh and not command.launches:
        raise GliderError(f"--fresh belongs to quickstart, not to {arguments.command}")
    if arguments.ranks and not (plans or command.launches or arguments.command == "bench"):
        instead = "slurm.nodes=N and slurm.ranks=M say" if arguments.command == "slurm" else "a launcher says"
        raise GliderError(
            "--ranks belongs to quickstart, plan, --dry-run and bench dispatch|joint, not to "
            f"{arguments.command}; {instead} how many ranks a stage has"
        )
    if not command.serves:
        adopt_slurm(os.environ)
    _set_up_logging()
    target = (COMMANDS["plan"] if plans else command).target
    if command.own_usage or (command.launches and not plans):
        return int(_load(target)(arguments))
    cfg = read_config(arguments.file, arguments.overrides)
    if plans:
        return int(_load(target)(cfg, arguments.command, arguments.ranks))
    if command.serves:
        return int(_load(target)(cfg))
    stop = StopWish(cfg.max_minutes)
    with ended_by_signals(stop):
        run_stage(arguments.command, cfg, _load(target), arguments.text, stop)
    return 0


def _load(target: str) -> Any:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


@contextmanager
def ended_by_signals(stop: StopWish) -> Iterator[None]:
    """Until the stage watches for signals itself, one ends the process as stopped: nothing has begun. When it has
    watched, one means nothing any more: all is done."""

    def end(number: int, frame: FrameType | None) -> None:
        if not stop.watched:
            raise SystemExit(EXIT_STOPPED)  # which an import that may fail lets through

    with signals_to(end):
        yield


def run_stage(name: str, cfg: Config, stage: Any, text: str | None = None, stop: StopWish | None = None) -> None:
    """Start the ranks, run one stage on them, and end them tidily. ``stop``: its time limit has begun already.

    Raises:
        Stopped: the job was asked to, and the ranks have agreed.
    """
    from glider_dist.job import Job
    from glider_dist.parallel.ranks import start_ranks

    stop = stop or StopWish(cfg.max_minutes)
    with stop.watching():
        stop.ranks = ranks = start_ranks(cfg.device)
        if not ranks.is_main:
            logging.getLogger().setLevel(logging.WARNING)
        job = Job(cfg, name, ranks, stop)
        if COMMANDS[name].keeps_record:
            job.check_run_dir()
        try:
            if text is None:
                stage(job)
            else:
                stage(job, text)
        except Stopped as stopped:
            if ranks.is_main:
                log.info("stopped (%s); the same command goes on", stopped)
            job.close("stopped", str(stopped))
            raise
        except Exception as error:
            job.fail(error)
            raise
        job.close()


def _set_up_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: record.name.startswith("glider_dist") or record.levelno >= logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler, EarlyLog()], force=True)
    # On import it warns of a CPU kernel that is not installed, also where nothing is quantised.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*past_key_values")


def _help(name: str) -> str:
    if name not in COMMANDS:
        rows = "\n".join(f"  {key:14} {command.doc}" for key, command in COMMANDS.items())
        codes = "0 done, 2 bad input, 85 stopped by a signal or max_minutes (run it again), 130 interrupted"
        return f"{USAGE}\ncommands:\n{rows}\n\nexit codes: {codes}"
    if COMMANDS[name].own_usage:
        return str(importlib.import_module(COMMANDS[name].target.partition(":")[0]).USAGE)
    lines = []
    defaults: dict[str, Any] = {}
    if COMMANDS[name].launches:
        from glider_dist.quickstart import DEFAULTS as defaults
    for setting in settings():
        default = defaults.get(setting.key, setting.default)
        choices = f" [{'|'.join(setting.choices)}]" if setting.choices else ""
        lines.append(f"  {setting.key}={default}  ({setting.kind}){choices}\n      {setting.doc}")
    return f"{USAGE}\n{name}: {COMMANDS[name].doc}\n\nsettings:\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
