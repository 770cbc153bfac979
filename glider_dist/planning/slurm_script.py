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
    'set -eu; . "$1" > /dev/null; shift; for name; do printf "%s\\0" "${!name}"; done; '
    'printf "%s\\0" "${OPTIONS[@]}" -- "${FETCH_OPTIONS[@]-}"'
)

MAY_STAY = 3
_SUBMIT = r"""#!/bin/bash
# Submits the pipeline; if one job is refused, those before it are cancelled.
set -euo pipefail
cd @directory@
# Of a job in which this is run, sbatch would take them for options; squeue takes its own for filters.
for name in "${!SLURM_@}" "${!SQUEUE_@}"; do
  case $name in SLURM_CONF | SLURM_CLUSTERS | SLURM_JWT) ;; *) unset "$name" ;; esac
done
jobs=@jobs@  # a line is ID or, of another cluster, ID;CLUSTER
submitted=() clusters=() left='' earlier=''

give_up() {
  local place cluster
  for place in "${!submitted[@]}"; do
    cluster=${clusters[place]}
    scancel ${cluster:+"--clusters=$cluster"} "${submitted[place]}" || left+=", ${submitted[place]}"
  done
  [ -n "$left" ] || exit 1
  echo "these jobs may stay submitted, cancel them: ${left#, }" >&2
  exit @may_stay@
}
trap give_up EXIT

living() {  # CLUSTER ID,ID..: a line "ID REASON" of each that has not ended
  local try answer
  for try in 1 2 3; do
    [ "$try" = 1 ] || sleep 3
    if answer=$(squeue -h ${1:+"--clusters=$1"} -j "$2" -o '%F %r' 2>&1); then
      sed -n '/^[0-9]/p' <<< "$answer"
      return
    fi
    # So it answers for a single one that it has forgotten.
    [[ $answer != *"Invalid job id"* ]] || return 0
  done
  echo "squeue does not tell whether the earlier jobs $2 have ended (${answer##*$'\n'});" \
    "submit again later, or delete $jobs if they have" >&2
  return 1
}

if [ -s "$jobs" ]; then
  kept='' waits=''
  while IFS= read -r cluster; do
    ids=$(sed -n "s/^\([0-9]\{1,\}\);\{0,1\}$cluster\$/\1/p" "$jobs" | paste -sd,)
    queue=$(living "$cluster" "$ids")
    for id in ${ids//,/ }; do
      grep -q "^$id " <<< "$queue" || continue
      held=$(sed -nE "/^$id .*(JobHold|[Hh]eld)/{s/^$id (.*)/ (held: \1)/p;q}" <<< "$queue")
      kept+=$id${cluster:+";$cluster"}$'\n' earlier+=${earlier:+:}$id waits+=", $id$held"
    done
  done < <(sed 's/^[0-9]*;*//' "$jobs" | sort -u)
  printf %s "$kept" > "$jobs"
  [ -z "$waits" ] || echo "waits for the earlier jobs ${waits#, }" >&2
fi

submit() {  # STAGE OPTION...
  local answer id cluster=''
  answer=$(sbatch --parsable "${@:2}" @folder@/"$1.sbatch")
  answer=${answer##*$'\n'}  # a site's own sbatch may say more before it
  id=${answer%%;*}
  if [[ ! $id =~ ^[0-9]+$ ]]; then
    echo "the last line of sbatch must be the id of the job of $1, but is '$answer'" >&2
    left+=", that of $1"
    return 1
  fi
  [ "$answer" = "$id" ] || cluster=${answer#*;}
  submitted+=("$id") clusters+=("$cluster")
  echo "$answer" >> "$jobs"
  echo "$1 $id"
}
""".replace("@may_stay@", str(MAY_STAY))


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
    more = () if partition else site.options
    if link.stage == "fetch":
        more = (*more, *site.fetch_options)
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
    earlier submissions have ended, however they end: they hold the experts that they still train. It exits with 1
    if nothing stays submitted, and with ``MAY_STAY`` if something may."""
    names = {"directory": submit_dir, "folder": folder, "jobs": folder / "jobs"}
    text = _SUBMIT
    for name, path in names.items():
        text = text.replace(f"@{name}@", shlex.quote(str(path)))
    lines = []
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
    return text + "\n".join([*lines, "trap - EXIT"]) + "\n"
