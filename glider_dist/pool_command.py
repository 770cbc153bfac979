"""The command ``pool``: import, list, check and export a pool of experts. Needs no GPU and starts no ranks."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glider_dist.config import OFFLINE_DEFAULT
from glider_dist.errors import GliderError
from glider_dist.pool import ExpertPool, Fingerprint, importing
from glider_dist.pool.calibration import check_calibration
from glider_dist.pool.export import export_merged, export_peft, export_vllm
from glider_dist.pool.listing import list_pool, show_expert
from glider_dist.pool.names import check_name
from glider_dist.pool.pack import pack, unpack
from glider_dist.pool.sources import PeftFolder, Source, find_adapters
from glider_dist.pool.verify import verify
from glider_dist.semantics.adapter_card import card_description

if TYPE_CHECKING:
    from glider_dist.cli import Arguments

log = logging.getLogger(__name__)

USAGE = """usage: glider-dist pool ACTION ...

  pool import POOL ADAPTER... [base=BASE] [--dry-run]
      Copy adapters into a pool; a missing pool is created. An ADAPTER is a PEFT folder, a folder of such folders,
      a pool, a glob ('**' for any depth), a hub id, a published PHATGOOSE or GLIDER checkpoint (.pt, .pth, .bin),
      or a text file that lists any of these, one a line. NAME=ADAPTER chooses the expert's name. All are checked
      first, and nothing is written if one is refused. base= is needed where the adapters name no base or
      different ones.
  pool add POOL NAME ADAPTER [gate=FILE]
      Add one adapter under a name.
  pool ls POOL
  pool show POOL NAME
  pool verify POOL
      Check every hash, shape, dtype, gate and value; exit code 2 and a list if something is wrong.
  pool remove POOL NAME...
  pool export POOL OUT [names=a,b] [format=peft|merged|model|vllm] [dtype=auto|float32|bfloat16] [base=BASE]
      peft: the adapters' folders; merged: their mean as one adapter; model: the base with that mean in its
      weights, in dtype=; vllm: the folders and a script that serves them. base= is for model and vllm where the
      pool's base has moved.
  pool pack POOL FILE.tar
  pool unpack FILE.tar POOL
"""

_OPTIONS = {"import": ("base",), "add": ("gate", "base"), "export": ("names", "format", "dtype", "base")}


def run(arguments: Arguments) -> int:
    """Run one action; returns the exit code.

    Raises:
        GliderError: an unknown action or option, or whatever the action refuses.
    """
    action, *words = arguments.words or [""]
    actions: dict[str, Callable[[list[str], dict[str, str]], int]] = {
        "import": lambda words, options: _import(words, options, arguments.dry_run),
        "add": _add,
        "ls": _ls,
        "show": _show,
        "verify": _verify,
        "remove": _remove,
        "export": _export,
        "pack": _pack,
        "unpack": _unpack,
    }
    if action not in actions:
        raise GliderError(
            f"pool does {', '.join(actions)}, not {action!r}; `glider-dist pool --help` explains them"
        )
    if arguments.dry_run and action != "import":
        raise GliderError(f"--dry-run belongs to pool import, not to pool {action}")
    if arguments.file is not None:
        raise GliderError(f"pool takes no configuration file ({arguments.file})")
    options = {}
    for item in arguments.overrides:
        key, _, value = item.partition("=")
        if key in _OPTIONS.get(action, ()):
            options[key] = value
        elif action == "import":
            words.append(item)
        else:
            known = ", ".join(f"{option}=" for option in _OPTIONS.get(action, ())) or "no options"
            raise GliderError(f"pool {action} does not know {item!r}; it takes {known}")
    return actions[action](words, options)


def _expect(words: Sequence[str], *names: str, more: bool = False) -> None:
    if len(words) < len(names) or (len(words) > len(names) and not more):
        wanted = " ".join(names) + ("..." if more else "")
        raise GliderError(f"this action takes {wanted}; it got {len(words)} arguments: {' '.join(words)}")


def _import(words: list[str], options: dict[str, str], dry_run: bool) -> int:
    _expect(words, "POOL", "ADAPTER", more=True)
    return _bring_in(Path(words[0]), find_adapters(words[1:]), options.get("base"), dry_run)


def _add(words: list[str], options: dict[str, str]) -> int:
    _expect(words, "POOL", "NAME", "ADAPTER")
    name = check_name(words[1])
    found = find_adapters([f"{name}={words[2]}"])
    if len(found) != 1:
        raise GliderError(f"{words[2]} holds {len(found)} experts; use pool import")
    source = found[0]
    if gate := options.get("gate"):
        if not isinstance(source, PeftFolder):
            raise GliderError(f"{words[2]} brings its own gates; gate= belongs to PEFT folders")
        source = PeftFolder(source.name, source.origin, source.folder, Path(gate))
    return _bring_in(Path(words[0]), [source], options.get("base"), dry_run=False)


def _bring_in(path: Path, sources: list[Source], base: str | None, dry_run: bool) -> int:
    pool = ExpertPool.open(path) if (path / "pool.json").exists() else None
    if pool is None and path.is_dir() and any(path.iterdir()) and not (path / "experts").exists():
        raise GliderError(f"{path} is no pool, but holds other files; the POOL comes first: name a new folder")
    known = Fingerprint()
    named = base
    if pool is not None:
        known = pool.fingerprint
        if base is not None and base != pool.base:
            pool.check_base(_shapes_of(base))
        if not known.sites:
            known = _shapes_of(pool.base)
    elif named is None:
        named = importing.common_base(_passed(importing.check(sources, None, {})))
    if named is not None and pool is None:
        known = _shapes_of(named)
    verdicts = _passed(importing.check(sources, pool, known.sites))
    print(importing.verdict_table(verdicts))
    if dry_run:
        print("nothing was written: --dry-run")
        return 0
    if pool is None:
        assert named is not None
        pool = ExpertPool.create(path, named, known)
    added, there = importing.write(pool, verdicts, _card_of)
    also = f", {there} were there already" if there else ""
    print(f"{added} experts imported into {path}{also}; it holds {len(ExpertPool.open(path))} for {pool.base}")
    return 0


def _passed(verdicts: list[importing.Verdict]) -> list[importing.Verdict]:
    bad = [verdict for verdict in verdicts if verdict.kind == "refused"]
    if bad:
        print(importing.verdict_table(verdicts))
        raise GliderError(f"{len(bad)} of {len(verdicts)} adapters are refused, so nothing is written")
    return verdicts


def _shapes_of(base: str) -> Fingerprint:
    from glider_dist.model.merge import base_shapes

    folder = Path(base).expanduser()
    if not base or (folder.is_dir() and not (folder / "config.json").exists()):
        raise GliderError(f"base={base} is no model: a folder with a config.json, or a hub id, is needed")
    return base_shapes(base)


def _card_of(source: Source) -> dict[str, Any]:
    found = card_description(source.readme_folder) if source.readme_folder else []
    return {"readme": found} if found else {}


def _ls(words: list[str], options: dict[str, str]) -> int:
    _expect(words, "POOL")
    print(list_pool(ExpertPool.open(words[0])))
    return 0


def _show(words: list[str], options: dict[str, str]) -> int:
    _expect(words, "POOL", "NAME")
    print(show_expert(ExpertPool.open(words[0]).expert(words[1])))
    return 0


def _verify(words: list[str], options: dict[str, str]) -> int:
    _expect(words, "POOL")
    pool = ExpertPool.open(words[0])
    # Both tell a broken card.
    problems = list(dict.fromkeys(verify(pool) + _stale(pool)))
    for problem in problems:
        print(problem)
    if problems:
        raise GliderError(f"pool {pool.path} has {len(problems)} problems, listed above")
    print(f"{len(pool)} experts, no problems")
    return 0


def _stale(pool: ExpertPool) -> list[str]:
    """What in ``router/`` is broken or was made for other experts or descriptions, or why that cannot be told."""
    from glider_dist.semantics.describe import descriptions_of
    from glider_dist.semantics.index import FILE, load_index

    try:
        descriptions = descriptions_of(pool)
    except GliderError as error:
        return [str(error)]
    index = pool.router_dir / FILE
    problems = []
    for works in (
        lambda: index.exists() and load_index(index, pool.names, descriptions),
        lambda: check_calibration(pool, index),
    ):
        try:
            works()
        except GliderError as error:
            problems.append(str(error))
    return problems


def _remove(words: list[str], options: dict[str, str]) -> int:
    _expect(words, "POOL", "NAME", more=True)
    pool = ExpertPool.open(words[0])
    names = list(dict.fromkeys(words[1:]))
    for name in names:
        pool.expert(name)
    for name in names:
        pool.remove(name)
    print(f"removed {len(names)}; {len(pool)} experts are left")
    return 0


def _export(words: list[str], options: dict[str, str]) -> int:
    _expect(words, "POOL", "OUT")
    pool, out = ExpertPool.open(words[0]), Path(words[1])
    names = [name for name in options.get("names", "").split(",") if name]
    kind = options.get("format", "peft")
    if "dtype" in options and kind != "model":
        raise GliderError("dtype= belongs to format=model; adapters keep the dtype they have")
    if "base" in options and kind not in ("model", "vllm"):
        raise GliderError("base= belongs to format=model and format=vllm; adapters name the base of their pool")
    if kind == "peft":
        print(f"{len(export_peft(pool, out, names))} adapters in {out}")
    elif kind == "merged":
        print(f"one adapter, the mean of {len(names or pool.names)}, in {export_merged(pool, out, names)}")
    elif kind == "vllm":
        script = export_vllm(pool, out, names, _folder_of(options.get("base", pool.base)))
        print(f"serve them with: sh {shlex.quote(str(script))}")
    elif kind == "model":
        from glider_dist.model.merge import export_model

        export_model(pool, out, names, options.get("dtype", "auto"), options.get("base"))
        print(f"a model with {len(names or pool.names)} experts merged in {out}")
    else:
        raise GliderError(f"format={kind!r} is unknown; choose peft, merged, model or vllm")
    return 0


def _folder_of(base: str) -> str:
    """Where another program finds the base from any folder: it knows neither our short name nor our paths."""
    from glider_dist.model.download import smollm2_folder

    if base == OFFLINE_DEFAULT:
        return str(smollm2_folder())
    path = Path(base).expanduser()
    return str(path.resolve()) if path.is_dir() else base


def _pack(words: list[str], options: dict[str, str]) -> int:
    _expect(words, "POOL", "FILE")
    print(f"{pack(ExpertPool.open(words[0]), Path(words[1]))} files in {words[1]}")
    return 0


def _unpack(words: list[str], options: dict[str, str]) -> int:
    _expect(words, "FILE", "POOL")
    pool = unpack(Path(words[0]), Path(words[1]))
    print(f"{len(pool)} experts in {pool.path}; `glider-dist pool verify {pool.path}` checks them")
    return 0
