"""Two hosts on one machine, which can be cut off from each other.

With root and iproute2 they are network namespaces on a bridge. Elsewhere they are two launchers on
loopback, of which the second is halted while it is "cut off".
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import ACCELERATE, children_of, free_port

_numbers = itertools.count(os.getpid() % 10_000 * 10)


class Hosts:
    """`kind`: namespaces or loopback. The processes that `start` began end with `two_hosts`."""

    def __init__(self, kind: str, names: tuple[str, str], addresses: tuple[str, str]) -> None:
        self.kind, self.names, self.addresses = kind, names, addresses
        self.port = free_port() if kind == "loopback" else 29500
        self.running: list[subprocess.Popen[str]] = []

    def launch(self, number: int, *words: str | Path) -> subprocess.Popen[str]:
        """`accelerate launch` on one of the hosts, one process on each."""
        command = [*ACCELERATE, "launch"]
        command += ["--multi_gpu", "--num_machines", "2", "--num_processes", "2"]
        command += ["--machine_rank", str(number), "--main_process_ip", self.addresses[0]]
        command += ["--main_process_port", str(self.port), "--mixed_precision", "no"]
        command += ["--max_restarts", "1", "--monitor_interval", "0.5"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        if self.kind == "namespaces":
            command = ["ip", "netns", "exec", self.names[number], *command]
            environment["GLOO_SOCKET_IFNAME"] = self.names[number]
        else:
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        process = subprocess.Popen(
            [*command, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def cut(self) -> None:
        """No packet of the second host reaches the first, nor the other way round."""
        if self.kind == "namespaces":
            _switch(self.names, "link", "set", "port1", "nomaster")
        else:
            self._signal_second(signal.SIGSTOP)

    def mend(self) -> None:
        if self.kind == "namespaces":
            _switch(self.names, "link", "set", "port1", "master", "bridge")
        else:
            self._signal_second(signal.SIGCONT)

    def _signal_second(self, number: signal.Signals) -> None:
        for process in _family(self.running[1].pid):
            os.kill(process, number)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    name = f"sr{next(_numbers)}"
    names, addresses = (f"{name}a", f"{name}b"), ("10.77.0.1", "10.77.0.2")
    hosts = Hosts("loopback", names, ("127.0.0.1", "127.0.0.1"))
    if os.geteuid() == 0 and shutil.which("ip"):
        made = subprocess.run(["ip", "netns", "add", f"{name}s"], capture_output=True)
        if made.returncode == 0:
            _connect(names, addresses)
            hosts = Hosts("namespaces", names, addresses)
    try:
        yield hosts
    finally:
        for process in hosts.running:
            for each in _family(process.pid) if process.poll() is None else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            process.communicate()
        if hosts.kind == "namespaces":
            for namespace in (*names, f"{name}s"):
                subprocess.run(["ip", "netns", "del", namespace], check=True)


def _family(process: int) -> list[int]:
    """A process and all that descend from it: ranks have sessions of their own."""
    return [process, *(each for child in children_of(process) for each in _family(child))]


def _connect(names: tuple[str, str], addresses: tuple[str, str]) -> None:
    """Each host has an interface of its own name, whose other end is a port of the bridge."""
    _switch(names, "link", "add", "bridge", "type", "bridge")
    _switch(names, "link", "set", "bridge", "up")
    for number, (name, address) in enumerate(zip(names, addresses, strict=True)):
        _ip("netns", "add", name)
        ends = ("type", "veth", "peer", "name", f"port{number}", "netns", f"{names[0][:-1]}s")
        _ip("link", "add", name, "netns", name, *ends)
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
        for interface in ("lo", name):
            _ip("-n", name, "link", "set", interface, "up")
        _switch(names, "link", "set", f"port{number}", "up", "master", "bridge")


def _switch(names: tuple[str, str], *words: str) -> None:
    _ip("-n", f"{names[0][:-1]}s", *words)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
