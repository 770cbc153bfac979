"""Where a job's embeddings come from: the model in this process, a given endpoint, or the job's own service."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import torch

from glider_dist.errors import GliderError
from glider_dist.semantics.auto import Access, OwnService
from glider_dist.semantics.client import RemoteEmbedder
from glider_dist.semantics.embedder import Embedder, TextEmbedder
from glider_dist.semantics.service.access import URL, is_loopback, is_unspecified, read_token

if TYPE_CHECKING:
    from collections.abc import Sequence

    from glider_dist.config import Config
    from glider_dist.parallel.ranks import Ranks


class EmbedderSource:
    """The embedder of a job and what must be ended with it. All ranks make it together.

    Raises:
        GliderError: a bad address or token, or the job's own service does not start.
    """

    def __init__(self, cfg: Config, ranks: Ranks):
        self.name = cfg.embedder
        self._own: OwnService | None = None
        self._remote: RemoteEmbedder | None = None
        self._embedder: TextEmbedder
        url = cfg.service.url or os.environ.get(URL) or None
        if url is None:
            self._embedder = Embedder(cfg.embedder)
            return
        token = read_token(cfg.service)
        own = url == "auto"
        if own:
            access = self._start(cfg, ranks)
            url, token = access.url, access.token
        fallback = (lambda: Embedder(cfg.embedder)) if cfg.service.fallback else None
        self._remote = RemoteEmbedder(cfg.embedder, url, cfg.service, token, fallback, own)
        self._embedder = self._remote

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """See :class:`~glider_dist.semantics.embedder.TextEmbedder`."""
        return self._embedder.embed(texts)

    def fingerprint(self) -> str | None:
        return self._embedder.fingerprint()

    def _start(self, cfg: Config, ranks: Ranks) -> Access:
        hosts = set(ranks.gather(socket.gethostname()))
        host = cfg.service.host
        reached_at = None
        if len(hosts) > 1:
            # Rank 0 is where MASTER_ADDR points, and all ranks have reached it there.
            master = os.environ.get("MASTER_ADDR", host)
            if is_loopback(host):
                host = master
            elif is_unspecified(host):
                reached_at = master
        elif is_unspecified(host):
            reached_at = "127.0.0.1"

        def start() -> None:
            self._own = OwnService(cfg, host, reached_at)

        ranks.on_main(start)
        access = ranks.gather(self._own.access if self._own is not None else None)[0]
        if access is None:
            raise GliderError("rank 0 has no embedding service")
        return access

    def close(self) -> None:
        """End the job's own service, if there is one."""
        if self._remote is not None:
            self._remote.close()
        if self._own is not None:
            self._own.stop()
