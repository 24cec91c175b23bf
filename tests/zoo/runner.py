"""Check many entries, each in a process of its own: a crash or a hang of one stops no other."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.zoo.check import Result, check
from tests.zoo.entries import has_implementations

__all__ = ["Job", "jobs_of", "run"]

TIMEOUT = 300.0
_LOG_LENGTH = 2000  # characters of a dead worker's last words


@dataclass(frozen=True)
class Job:
    """One check to do: an entry, and "sdpa", "eager" or "own"."""

    name: str
    attn: str


def jobs_of(names: Iterable[str], attn: str = "both") -> list[Job]:
    """The jobs for these entries; those without attention implementations are checked once.

    >>> jobs_of(["bert", "handwritten/nanogpt"])  # doctest: +NORMALIZE_WHITESPACE
    [Job(name='bert', attn='sdpa'), Job(name='bert', attn='eager'),
     Job(name='handwritten/nanogpt', attn='own')]
    """
    kinds = ("sdpa", "eager") if attn == "both" else (attn,)
    return [
        Job(name, kind)
        for name in names
        for kind in (kinds if has_implementations(name) else ("own",))
    ]


def run(jobs: Iterable[Job], workers: int = 1, timeout: float = TIMEOUT) -> Iterator[Result]:
    """Yield a result for every job, as they finish.

    Args:
        jobs: What to check.
        workers: How many processes at a time.
        timeout: Seconds after which a job's process is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.zoo.runner"])
    waiting, running = list(jobs)[::-1], list[_Worker]()
    with TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop()
                    log = Path(folder, f"{len(waiting)}.log")
                    running.append(_Worker.start(context, job, log, timeout))
                wait([worker.receiver for worker in running], timeout=min(1.0, timeout))
                for worker in [worker for worker in running if worker.is_done()]:
                    running.remove(worker)
                    yield worker.result()
        finally:
            for worker in running:
                worker.process.kill()


@dataclass(frozen=True)
class _Worker:
    """A process at work on a job, and the pipe that its result comes through."""

    job: Job
    process: BaseProcess
    receiver: Connection
    log: Path
    started: float
    timeout: float

    @classmethod
    def start(
        cls, context: multiprocessing.context.ForkServerContext, job: Job, log: Path, timeout: float
    ) -> _Worker:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, sender, log, timeout), daemon=True)
        process.start()
        sender.close()
        return cls(job, process, receiver, log, time.perf_counter(), timeout)

    def is_done(self) -> bool:
        return self.receiver.poll() or self._elapsed() > self.timeout

    def result(self) -> Result:
        """What the process sent; if it sent nothing, how it ended."""
        result = self._received() if self.receiver.poll() else self._failed("timeout")
        self.process.kill()
        self.process.join()
        self.receiver.close()
        return result

    def _received(self) -> Result:
        try:
            received: Result = self.receiver.recv()
        except EOFError:
            self.process.join()
            return self._failed("crash")
        return received

    def _failed(self, status: str) -> Result:
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        stack = log.find("(most recent call first)")
        last_words = log[stack : stack + _LOG_LENGTH] if stack >= 0 else log[-_LOG_LENGTH:]
        detail = f"exit code {self.process.exitcode}\n{last_words}"
        return Result(self.job.name, self.job.attn, status, seconds=self._elapsed(), detail=detail)

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started


def _work(job: Job, sender: Connection, log: Path, timeout: float) -> None:
    """In the process: check, with everything printed going to the log, and where it hangs."""
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    faulthandler.dump_traceback_later(0.95 * timeout)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result = check(job.name, job.attn)
    faulthandler.cancel_dump_traceback_later()
    sender.send(result)
    sender.close()
