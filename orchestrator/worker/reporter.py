"""The rank's end of the socket to its node agent."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

from orchestrator.messages import Event, RankLaunch, Report

_MESSAGE_CHARACTERS = 8_000


class Reporter:
    """Sends reports; never the reason that training stops: an agent that is gone is the zygote's to notice."""

    def __init__(self, launch: RankLaunch, descriptor: int) -> None:
        self._launch, self._socket = launch, socket.socket(fileno=descriptor)

    def send(self, report: Report) -> None:
        with contextlib.suppress(OSError):
            self._socket.send(report.model_dump_json().encode())

    def event(self, kind: str, message: str, **data: Any) -> None:
        self.send(
            Event(
                kind=kind,
                message=message[:_MESSAGE_CHARACTERS],
                attempt=self._launch.attempt,
                rank=self._launch.rank,
                data=data,
            )
        )
