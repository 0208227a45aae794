"""The proxy of `proxy_kit` in a process of its own: some drivers hold the interpreter's lock while they wait, so
that a proxy in the same process could never answer. Its counts are asked for over a pipe.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from proxy_kit import RunningProxy

ANSWER_S = 60.0


class ProxyProcess:
    """Starts, stops and questions it. One thread at a time."""

    def __init__(self, config: dict[str, Any], server: Any) -> None:
        names = ("host", "port", "user", "password", "database")
        place = SimpleNamespace(**{name: getattr(server, name) for name in names})
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, config, place), name="proxy", daemon=True)
        self._process.start()
        there.close()
        self.port: int = self._answer("the proxy to start")

    def clean(self) -> None:
        """Nothing is left over: no client, lease or waiter; every invariant of the machines holds."""
        self._ask("clean")

    def counts(self) -> dict[str, int]:
        """How many slots are in each state, over all pools; and `waiting`."""
        return self._ask("counts")  # type: ignore[no-any-return]

    def stop(self) -> None:
        """Stop it; raises what went wrong on its loop."""
        try:
            self._ask("stop")
            self._process.join(ANSWER_S)
            assert self._process.exitcode == 0
        finally:
            self._process.kill()
            self._process.join()
            self._pipe.close()

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._answer(what)

    def _answer(self, what: str) -> Any:
        assert self._pipe.poll(ANSWER_S), f"no answer within {ANSWER_S:g} s to: {what}"
        problem, answer = self._pipe.recv()
        assert not problem, f"{what}: {problem}"
        return answer


def _serve(pipe: Connection, config: dict[str, Any], server: Any) -> None:
    """The other process: start, answer questions, stop."""
    proxy = RunningProxy(config, server)
    questions = {"clean": proxy.clean, "counts": proxy.counts}
    try:
        pipe.send(("", proxy.start().port))
        for what in iter(pipe.recv, "stop"):
            pipe.send(_answered(questions[what]))
        pipe.send(_answered(proxy.stop))
    except EOFError:  # whoever asked is gone
        proxy.stop()


def _answered(question: Any) -> tuple[str, Any]:
    try:
        return "", question()
    except Exception as error:
        return f"{type(error).__name__}: {error}", None
