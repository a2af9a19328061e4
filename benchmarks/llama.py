"""Times llama.cpp beside us, in a process of its own: it may end with SIGILL, and must not take
the benchmark with it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from qnpu_jax.latency.cpu import TimedCall

NAME = "llama.cpp"
DECODE = "decode"


@dataclass(frozen=True)
class Peer:
    """GGUF that llama.cpp runs, with lengths and threads."""

    path: Path
    prefill: int
    context: int
    threads: int


@contextmanager
def started(peer: Peer) -> Iterator[list[TimedCall]]:
    """Calls of prefill and decode on a GGUF, while its process lives. Where llama-cpp-python is not
    installed or does not run here, it prints why and yields none."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, peer), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen here
    try:
        answer = _answer(ours)
        if answer is None:
            process.join()
            answer = _ended(process.exitcode or 0)
        if answer:
            print(f"{NAME}: {answer}; it is not in the table")
        yield [] if answer else _calls(ours, peer)
    finally:
        process.kill()
        process.join()


def _ended(status: int) -> str:
    if status == -signal.SIGILL:
        # 0.3.36 has a worker thread compute on AMX tiles that only another thread configured.
        return "its process ended with SIGILL, as builds for another CPU do, or 0.3.36 with AMX"
    return f"its process ended with status {status}"


def _calls(pipe: Connection, peer: Peer) -> list[TimedCall]:
    def call(what: str) -> None:
        if (answer := _answer(pipe, what)) != "":
            raise RuntimeError(f"{NAME}: {what} failed: {answer or 'its process ended'}")

    key = f"prefill_{peer.prefill}"
    return [
        TimedCall(NAME, key, peer.prefill, lambda: call(key)),
        TimedCall(NAME, DECODE, 1, lambda: call(DECODE)),
    ]


def _answer(pipe: Connection, asked: str | None = None) -> str | None:
    """Waits for the process: empty where it did what was asked, else its error; None where it is
    gone."""
    try:
        if asked is not None:
            pipe.send(asked)
        return pipe.recv()
    except (EOFError, OSError):
        return None


def _serve(pipe: Connection, peer: Peer) -> None:
    """Loads the model, then does what it is asked; each time it says what went wrong, empty for
    nothing."""
    try:
        run = _loaded(peer)
        while True:
            pipe.send("")
            run(pipe.recv())
    except EOFError:  # nobody asks any more
        return
    except ImportError:
        pipe.send("llama-cpp-python is not installed")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _loaded(peer: Peer) -> Callable[[str], None]:
    """Functions that run one signature each, by name."""
    from llama_cpp import Llama

    made = Llama(
        str(peer.path),
        n_ctx=peer.context,
        n_threads=peer.threads,
        n_threads_batch=peer.threads,
        n_batch=peer.prefill,
        verbose=False,
    )
    prompt = list(range(100, 100 + peer.prefill))

    def run(what: str) -> None:
        if what == DECODE:  # the cache holds the prompt, as after a prefill
            made.n_tokens = peer.prefill
            made.eval([7])
        else:
            made.reset()
            made.eval(prompt)

    run(f"prefill_{peer.prefill}")
    return run
