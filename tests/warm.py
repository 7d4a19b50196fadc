"""Processes that start in milliseconds: forked from a server that has imported everything and
computed nothing.

A process that has computed must not be forked once torch has threads; the server has none. Helps
the tests that kill processes and those that need several at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback

PRELOAD = [
    "stages.data",
    "stages.target",
    "stages.pretrain",
    "stages.transfer",
    "stages.tasks.finetune",
    "stages.methods.mae",
    "stages.methods.random",
    "stages.methods.supervised",
    "stages.targets.dino",
    "stages.targets.vqkd",
    "pytest",
    "torch.nn.parallel",
    "torch.distributed",
]


def context():
    """Of multiprocessing: its processes are forked from the warm server."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


class Workers:
    """Processes that wait for functions to call: `world` ranks of one gloo group, in float64 if
    `double`.
    """

    def __init__(self, world: int, double: bool):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = multiprocessing.Pipe()
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context().Process(
                target=_serve, args=(theirs, environment, double), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, function, *args) -> list:
        """What the function returns in each process; RuntimeError with its traceback if it raises
        in one.
        """
        self.send(function, *args)
        return self.results()

    def send(self, function, *args) -> None:
        for pipe in self.pipes:
            pipe.send((function, args))

    def results(self, seconds: float = 120) -> list:
        found = []
        for pipe in self.pipes:
            if not pipe.poll(seconds):
                self.close()
                raise TimeoutError(f"no answer after {seconds} s")
            found.append(pipe.recv())
        for fine, result in found:
            if not fine:
                raise RuntimeError(result)
        return [result for _, result in found]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe, environment: dict, double: bool) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)
    if double:  # what is float32 on purpose, losses and quantisers, is float64 here
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
