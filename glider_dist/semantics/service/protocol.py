"""uvicorn's HTTP/1.1 connections, closed if the head of a request does not arrive in time or is too large."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
HEAD_BYTES = 1 << 16
KEEP_ALIVE_SECONDS = 75


class PatientProtocol(HttpToolsProtocol):
    """uvicorn itself waits for ever for a first request and for the rest of a head, and keeps heads of
    any size, all before a token is looked at."""

    _deadline: asyncio.TimerHandle | None = None
    _head = _fields = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._head += len(data)  # until the head is whole
        super().data_received(data)
        if self._deadline is not None and self._head > HEAD_BYTES:
            self._give_up()
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self._deadline is None and self.timeout_keep_alive_task is None:
            self._arm()

    def on_message_begin(self) -> None:
        self._fields = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # Those of the trailer count, too.
        self._fields += len(name) + len(value) + 4
        if self._fields > HEAD_BYTES:
            self._give_up()
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._disarm()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._head = 0
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.abort()
