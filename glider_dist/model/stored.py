"""What a pool keeps for local scores besides gates: Arrow's prototypes, and mean activations.

    router/prototypes/arrow/HASH-DTYPE.safetensors    {site: [d_in]}, a cache: may be deleted at any time
    experts/NAME/activation.safetensors               {site: [d_in]}, written by average-activations

Both are tied to the hash of the adapter they were made from, so that they never serve another one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank
from glider_dist.pool import Expert, ExpertPool
from glider_dist.pool.adapter import CARD_FILE, WEIGHTS_FILE
from glider_dist.pool.files import sha256, write_tensors
from glider_dist.routing.local import arrow_prototypes

log = logging.getLogger(__name__)

ACTIVATION_FILE = "activation.safetensors"


def weights_hashes(pool: ExpertPool, owned: Sequence[int] | None = None) -> list[str]:
    """The sha256 of the weights of the pool's experts, or of these, as they are now; "" where they cannot be read,
    of which whoever loads them tells."""
    experts = pool.experts()
    found = []
    for index in range(len(experts)) if owned is None else owned:
        try:
            found.append(_weights_hash(experts[index]))
        except (OSError, GliderError):
            found.append("")
    return found


def cached_arrow_prototypes(
    folder: Path, hashes: Sequence[str], banks: dict[str, SiteBank]
) -> dict[str, torch.Tensor]:
    """Arrow's prototypes of experts: read from ``folder/prototypes/arrow``, and written there where missing.

    One file per expert, named by the sha256 of its weights and by the dtype that the prototypes were made from, so
    that another adapter has another file. Files that nobody asks for stay where they are. A pool that cannot be
    written to serves as well.

    Args:
        folder: the pool's ``router``.
        hashes: of the weights that the banks hold; those on disk may have changed since. "": not known.

    Returns:
        ``{site: [E, d]}`` of these experts on their device.
    """
    kind = str(next(iter(banks.values())).A.dtype).removeprefix("torch.")
    paths = [folder / "prototypes" / "arrow" / f"{found}-{kind}.safetensors" for found in hashes]
    found = [_read(path, banks, index) if hashes[index] else None for index, path in enumerate(paths)]
    missing = [index for index, tensors in enumerate(found) if tensors is None]
    made = {}
    for site, bank in banks.items():
        if missing:
            made[site] = arrow_prototypes(bank.A[missing], bank.B[missing].transpose(1, 2))
    for place, index in enumerate(missing):
        found[index] = {site: made[site][place] for site, bank in banks.items() if bank.ranks[index]}
        if not hashes[index]:
            continue
        try:
            write_tensors(paths[index], found[index] or {})
        except OSError as error:
            log.debug("prototypes are not cached: %s", error)
    result = {}
    for site, bank in banks.items():
        zero = torch.zeros(bank.A.shape[2])
        rows = [(tensors or {}).get(site, zero) for tensors in found]
        made_of = [row.to(bank.A.device) for row in rows]
        result[site] = torch.stack(made_of) if made_of else bank.A.new_zeros(0, bank.A.shape[2], dtype=zero.dtype)
    return result


def _weights_hash(expert: Expert) -> str:
    """From the card, or anew if the card does not know it or the weights were written after the card."""
    weights, card = expert.folder / WEIGHTS_FILE, expert.folder / CARD_FILE
    known = expert.card().get("files", {}).get(WEIGHTS_FILE)
    if known and weights.stat().st_mtime_ns <= card.stat().st_mtime_ns:
        return str(known)
    return sha256(weights)


def _read(path: Path, banks: dict[str, SiteBank], index: int) -> dict[str, torch.Tensor] | None:
    """The file's tensors, or None if it is missing, broken or of other sites."""
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None
    shapes = {site: (bank.A.shape[2],) for site, bank in banks.items() if bank.ranks[index]}
    # Half precision is what an earlier version wrote under autocast.
    exact = all(value.dtype in (torch.float32, torch.float64) for value in tensors.values())
    return tensors if exact and {site: tuple(value.shape) for site, value in tensors.items()} == shapes else None


def write_activations(expert: Expert, means: dict[str, torch.Tensor], made_from: str) -> None:
    """Store them beside the adapter, with its hash and ``made_from``, a digest of the data; noted in the card."""
    path = expert.folder / ACTIVATION_FILE
    write_tensors(path, means, {"adapter": _weights_hash(expert), "made_from": made_from})
    expert.update_card(files={**expert.card().get("files", {}), ACTIVATION_FILE: sha256(path)})


def activations_made_from(expert: Expert) -> str | None:
    """What :func:`write_activations` was told, or None if there is no file for the adapter as it is now."""
    metadata = _metadata(expert.folder / ACTIVATION_FILE)
    return metadata.get("made_from") if metadata.get("adapter") == _weights_hash(expert) else None


def read_activations(
    pool: ExpertPool, hashes: Sequence[str], banks: dict[str, SiteBank]
) -> dict[str, torch.Tensor]:
    """The mean inputs of all experts; ``{site: [E, d_in]}`` fp32, 0 where an expert does not adapt the site.

    Args:
        hashes: of the weights that the banks hold.

    Raises:
        GliderError: an expert has none, they were made with other weights or for other sites, or the pool has
            changed since the banks were read.
    """
    # Anew, as it is on disk: an open pool remembers its experts' names.
    if weights_hashes(ExpertPool.open(pool.path)) != list(hashes):
        raise GliderError(f"pool {pool.path} has changed since it was attached; detach it and attach it again")
    result = {site: torch.zeros(bank.A.shape[0], bank.A.shape[2]) for site, bank in banks.items()}
    for index, expert in enumerate(pool.experts()):
        path = expert.folder / ACTIVATION_FILE
        if not path.exists():
            raise GliderError(
                f"pool {pool.path}: expert {expert.name!r} has no average activations; run average-activations, "
                "or choose a router without them such as router.kind=arrow"
            )
        if activations_made_from(expert) is None:
            raise GliderError(f"{path} was made with other weights of the expert; run average-activations again")
        with safe_open(path, framework="pt") as file:
            tensors = {site: file.get_tensor(site) for site in file.keys()}  # noqa: SIM118
        for site, bank in banks.items():
            if bank.ranks[index]:
                if site not in tensors or tuple(tensors[site].shape) != (bank.A.shape[2],):
                    raise GliderError(f"{path} has no fitting vector for {site}; run average-activations again")
                result[site][index] = tensors[site]
    return result


def _metadata(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise GliderError(f"{path} cannot be read ({error}); run average-activations again") from None
