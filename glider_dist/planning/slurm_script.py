"""Batch scripts: ``slurm/stage.sbatch`` with a site's options and a stage's words, and one that submits them."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.planning.slurm_chain import ONE_RANK, Link

TEMPLATE, RANK, SITE = "stage.sbatch", "rank.py", "site.env"
_MARK = "# @settings@\n"
_VARIABLES = (
    "PARTITION", "ACCOUNT", "QOS", "CONSTRAINT", "TIME", "GPUS_PER_NODE", "CPUS_PER_RANK", "MEMORY",
    "FETCH_PARTITION", "RANKS_PER_NODE",
)  # fmt: skip
# The values, each ended by a zero byte, and then those of the arrays. Older site files have no FETCH_OPTIONS.
_SHOW = (
    'set -eu; . "$1"; shift; for name; do printf "%s\\0" "${!name}"; done; '
    'printf "%s\\0" "${OPTIONS[@]}" -- "${FETCH_OPTIONS[@]-}"'
)


@dataclass(frozen=True)
class Site:
    """A cluster's settings, as bash reads them from ``file``."""

    file: Path
    values: dict[str, str]
    options: tuple[str, ...]
    fetch_options: tuple[str, ...]

    @classmethod
    def read(cls, file: Path) -> Site:
        """Raises GliderError if the file is missing, is no bash or lacks a setting."""
        if not file.is_file():
            raise GliderError(
                f"the site file {file} does not exist; copy slurm/site.env and name it by slurm.site"
            )
        command = ["bash", "-c", _SHOW, "site", str(file), *_VARIABLES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "it ends with an error").splitlines()[-1]
            raise GliderError(f"the site file {file} cannot be read by bash: {reason}")
        values = done.stdout.split("\0")[:-1]
        arrays = values[len(_VARIABLES) :]
        middle = arrays.index("--")
        options, fetch = (tuple(filter(None, part)) for part in (arrays[:middle], arrays[middle + 1 :]))
        return cls(file, dict(zip(_VARIABLES, values, strict=False)), options, fetch)

    def number(self, name: str, least: int) -> int:
        """Raises GliderError unless the setting is a whole number of at least ``least``."""
        text = self.values[name]
        if not text.isdecimal() or int(text) < least:
            raise GliderError(f"{name} is {text!r} in {self.file}, but must be a number of at least {least}")
        return int(text)


def directives(link: Link, cfg: Config, site: Site, folder: Path) -> list[str]:
    """The options of sbatch for a job; its output goes to ``folder``."""
    values = site.values
    gpus = site.number("GPUS_PER_NODE", 0)
    if gpus and link.ranks > gpus:
        raise GliderError(
            f"{link.ranks} ranks per node need as many GPUs, but {site.file} has GPUS_PER_NODE={gpus}"
        )
    if link.stage in ONE_RANK:
        gpus = 0 if link.stage == "fetch" else min(gpus, 1)
    partition = values["FETCH_PARTITION"] if link.stage == "fetch" else ""
    if partition:
        # What only the other nodes have would be refused on these, or waited for without end.
        values = {**values, "PARTITION": partition, "QOS": "", "CONSTRAINT": "", "MEMORY": ""}
    chosen = {
        "job-name": f"glider-{link.stage}",
        "output": f"{folder}/{link.stage}-%A_%a.out" if link.shards else f"{folder}/{link.stage}-%j.out",
        "array": ",".join(map(str, link.shards)),
        "nodes": str(link.nodes),
        "ntasks-per-node": str(link.ranks),
        "cpus-per-task": values["CPUS_PER_RANK"],
        "gpus-per-node": str(gpus or ""),
        "mem": values["MEMORY"],
        "time": cfg.slurm.time or values["TIME"],
        "partition": values["PARTITION"],
        "account": values["ACCOUNT"],
        "qos": values["QOS"],
        "constraint": values["CONSTRAINT"],
    }
    more = site.fetch_options if partition else site.options
    return [*(f"--{name}={value}" for name, value in chosen.items() if value), *more]


def stage_script(template: str, options: Sequence[str], settings: dict[str, str], words: Sequence[str]) -> str:
    """The template with options of sbatch after its first line, and settings and words in its place for them."""
    first, _, rest = template.partition("\n")
    head, mark, body = rest.partition(_MARK)
    if not mark:
        raise GliderError(f"{TEMPLATE} has no line {_MARK.strip()!r}; take it from the repository again")
    directive = "".join(f"#SBATCH {_quoted(option)}\n" for option in options)
    assigned = "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
    return f"{first}\n{directive}{head}{assigned}set -- {shlex.join(words)}\n{body}"


def _quoted(option: str) -> str:
    # sbatch splits these lines as a shell does, but a quote inside a word stays.
    return f'"{option}"' if " " in option else option


def chain_script(chain: Sequence[Link], folder: Path, submit_dir: Path) -> str:
    """A script that submits all jobs or none and prints each stage's id. The first stage waits until the jobs of
    earlier submissions have ended, however they end: they hold the experts that they still train."""
    jobs = shlex.quote(str(folder / "jobs"))
    lines = [
        "#!/bin/bash",
        "# Submits the pipeline; if one job is refused, those before it are cancelled.",
        "set -Eeuo pipefail",
        f"cd {shlex.quote(str(submit_dir))}",
        "submitted=()",
        """trap '[ "${#submitted[@]}" = 0 ] || scancel "${submitted[@]}"' ERR""",
        f"jobs={jobs} earlier=",
        # A controller that is away, or knows none of these jobs any more, fails: nothing is waited for then.
        "states=PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING",
        'if [ -s "$jobs" ] && queue=$(squeue -h -j "$(paste -sd, "$jobs")" -t "$states" -o %F 2> /dev/null); then',
        """  sort -u <<< "$queue" | sed '/^$/d' > "$jobs\"""",
        '  earlier=$(paste -sd: "$jobs")',
        '  [ -z "$earlier" ] || echo "waits for the earlier jobs ${earlier//:/, }" >&2',
        "fi",
        "submit() {  # STAGE OPTION...",
        "  local id",
        f'  id=$(sbatch --parsable "${{@:2}}" {shlex.quote(str(folder))}/"$1.sbatch")',
        '  submitted+=("${id%%;*}")',
        '  echo "${id%%;*}" >> "$jobs"',
        '  echo "$1 ${id%%;*}"',
        "}",
    ]
    place: dict[str, int] = {}
    for link in chain:
        words = ["submit", link.stage]
        if link.after is not None:
            kind = "aftercorr" if link.matching else "afterok"
            words += [f'"--dependency={kind}:${{submitted[{place[link.after]}]}}"', "--kill-on-invalid-dep=yes"]
        else:
            words.append('${earlier:+"--dependency=afterany:$earlier"}')
        place[link.stage] = len(place)
        lines.append(" ".join(words))
    return "\n".join(lines) + "\n"
