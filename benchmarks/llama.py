"""llama.cpp as a peer, in a process of its own: a build for another CPU ends with SIGILL, and must
not take the benchmark with it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from qnpu_jax.npu.host import Call

NAME = "llama.cpp"
DECODE = "decode"


@dataclass(frozen=True)
class Peer:
    """What it runs, and how."""

    path: Path
    prefill: int
    context: int
    threads: int


@contextmanager
def started(peer: Peer) -> Iterator[list[Call]]:
    """Calls of prefill and decode on a GGUF, while its process lives; none, and why is printed,
    where llama-cpp-python is not installed or does not run here."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, peer), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen here
    try:
        answer = _answer(ours)
        if answer is None:
            process.join()
            code = process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            answer = f"its process ended with {how}; build llama-cpp-python on this CPU"
        if answer:
            print(f"{NAME}: {answer}; it is not in the table")
        yield [] if answer else _calls(ours, peer)
    finally:
        process.kill()
        process.join()


def _calls(pipe: Connection, peer: Peer) -> list[Call]:
    def call(what: str) -> None:
        pipe.send(what)
        if (answer := _answer(pipe)) != "":
            raise RuntimeError(f"{NAME}: {what} failed: {answer or 'its process ended'}")

    key = f"prefill_{peer.prefill}"
    return [
        Call(NAME, key, peer.prefill, lambda: call(key)),
        Call(NAME, DECODE, 1, lambda: call(DECODE)),
    ]


def _answer(pipe: Connection) -> str | None:
    """Empty: done; else what went wrong. None: the process is gone."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def _serve(pipe: Connection, peer: Peer) -> None:
    """Answers every request with what went wrong, empty for nothing; the first is not asked for."""
    try:
        from llama_cpp import Llama
    except ImportError:
        pipe.send("llama-cpp-python is not installed")
        return
    made = Llama(
        str(peer.path),
        n_ctx=peer.context,
        n_threads=peer.threads,
        n_threads_batch=peer.threads,
        n_batch=peer.prefill,
        verbose=False,
    )
    prompt = list(range(100, 100 + peer.prefill))
    made.eval(prompt)
    pipe.send("")
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        if asked == DECODE:  # the cache holds the prompt, as after a prefill
            made.n_tokens = peer.prefill
            made.eval([7])
        else:
            made.reset()
            made.eval(prompt)
        pipe.send("")
