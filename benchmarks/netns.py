"""Run a command as several ranks of one machine, each in a network namespace of its own, over slow
links.

    python benchmarks/netns.py --delay 50ms --rate 100mbit -- python benchmarks/pipelines.py --check

Delay and rate hold for all that a rank sends, whoever gets it: between two ranks a byte takes
``--delay`` one way and a round trip takes twice as long; each direction carries ``--rate``. Both
are measured inside before the command runs.

Where the kernel has netem, the namespaces are joined by veth pairs and a bridge. Where it has not,
they have TUN devices, and this program carries the packets, by the same rules: a packet leaves when
its link is free, and arrives after the delay. That takes processor time, which is printed. Needs
root and iproute2; without, it says so and exits 0.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import fcntl
import heapq
import os
import re
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

PREFIX, DEVICE, PORT, MTU = "dni", "eth0", 29500, 9000
TUN = Path("/dev/net/tun")
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x1, 0x1000, 0x40000000
SO_RCVBUFFORCE = 33
GRACE = 5.0  # seconds between asking ranks to end and ending them
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def quantity(text: str) -> float:
    """Seconds or bit/s of what tc would read, such as ``50ms`` or ``100mbit``."""
    match = re.fullmatch(r"([\d.]+)([a-z]+)", text)
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{text!r} is not a number with one of {', '.join(UNITS)}")
    return float(match[1]) * UNITS[match[2]]


def address(rank: int) -> str:
    """IPv4 address of a rank; `Relay` reads the rank from its last byte."""
    return f"10.77.0.{rank + 1}"


def call(line: str) -> str:
    """Run a command whose words hold no spaces."""
    return subprocess.run(line.split(), check=True, capture_output=True, text=True).stdout


def find_means(slow: bool = True) -> tuple[str | None, str]:
    """How links can be made here, ``veth`` or ``relay``, or None and why they cannot; ``slow``:
    they need netem.
    """
    if shutil.which("ip") is None:
        return None, "`ip` is not installed (package iproute2)"
    if os.geteuid() != 0:
        return None, "network namespaces need root"
    name = f"{PREFIX}{os.getpid()}-try"
    try:
        call(f"ip netns add {name}")
    except subprocess.CalledProcessError as error:
        return None, f"network namespaces are not permitted: {error.stderr.strip()}"
    try:
        if slow:
            call(f"ip netns exec {name} tc qdisc add dev lo root netem delay 1ms")
        return "veth", ""
    except subprocess.CalledProcessError as error:
        return (
            ("relay", "")
            if TUN.exists()
            else (None, f"neither netem nor {TUN}: {error.stderr.strip()}")
        )
    finally:
        call(f"ip netns del {name}")


def why_not() -> str | None:
    """Why ranks cannot be run over slow links here, or None where they can."""
    return find_means()[1] or None


class Relay(threading.Thread):
    """Carries packets between TUN devices.

    Attributes:
        used: processor seconds so far.
    """

    def __init__(self, tuns: Sequence[int], delay: float, rate: float) -> None:
        super().__init__(daemon=True)
        self.tuns, self.delay, self.rate = list(tuns), delay, rate
        self.used, self.ending = 0.0, False

    def run(self) -> None:
        """Until `ending`; ahead of all ordinary processes where that is allowed, or packets would
        be late.
        """
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        free = dict.fromkeys(self.tuns, 0.0)  # when a link has sent all that it got
        under_way: list[tuple[float, int, int, bytes]] = []
        order = 0
        while not self.ending:
            wait = under_way[0][0] - time.monotonic() if under_way else 0.1
            for tun in select.select(self.tuns, [], [], min(max(wait, 0.0), 0.1))[0]:
                packet = os.read(tun, 1 << 16)
                receiver = (
                    packet[19] - 1 if packet[0] >> 4 == 4 else -1
                )  # neither IPv6 nor multicast goes anywhere
                if 0 <= receiver < len(self.tuns):
                    free[tun] = max(free[tun], time.monotonic()) + 8 * len(packet) / self.rate
                    order += 1
                    heapq.heappush(
                        under_way, (free[tun] + self.delay, order, self.tuns[receiver], packet)
                    )
            while under_way and under_way[0][0] <= time.monotonic():
                with contextlib.suppress(OSError):  # a full queue drops, as anywhere
                    os.write(*heapq.heappop(under_way)[2:])
            self.used = time.thread_time()


class Network:
    """Namespaces with links; `close` removes them, as does the end of this process in any order but
    SIGKILL.
    """

    def __init__(self, ranks: int, delay: str | None = None, rate: str | None = None) -> None:
        self.ranks, self.delay, self.rate = ranks, delay, rate
        self.base = f"{PREFIX}{os.getpid()}"
        self.names = [f"{self.base}-{rank}" for rank in range(ranks)]
        self.tuns: list[int] = []
        self.relay: Relay | None = None
        means, reason = find_means(bool(delay or rate))
        if means is None:
            raise RuntimeError(reason)
        self.means = means
        sweep()
        atexit.register(self.close)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if self.means == "veth":
            call(f"ip link add {self.base}-br type bridge")
            call(f"ip link set {self.base}-br mtu {MTU} up")
        for rank, name in enumerate(self.names):
            outside = f"{self.base}v{rank}"
            call(f"ip netns add {name}")
            if self.means == "veth":
                call(
                    f"ip link add {outside} mtu {MTU} type veth peer name {DEVICE} netns {name} "
                    f"mtu {MTU}"
                )
                call(f"ip link set {outside} master {self.base}-br up")
            else:
                self.tuns.append(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))
                fcntl.ioctl(
                    self.tuns[-1],
                    TUNSETIFF,
                    struct.pack("16sH22x", outside.encode(), IFF_TUN | IFF_NO_PI),
                )
                call(f"ip link set {outside} netns {name} name {DEVICE}")
            call(f"ip -n {name} address add {address(rank)}/24 dev {DEVICE}")
            call(f"ip -n {name} link set lo up")
            call(f"ip -n {name} link set {DEVICE} mtu {MTU} txqueuelen 10000 up")
            if self.means == "veth" and (self.delay or self.rate):
                slow = (f" delay {self.delay}" if self.delay else "") + (
                    f" rate {self.rate}" if self.rate else ""
                )
                call(
                    f"ip netns exec {name} tc qdisc add dev {DEVICE} root netem{slow} limit 100000"
                )
        if self.means == "relay":
            delay, rate = quantity(self.delay or "0s"), quantity(self.rate or "1000gbit")
            self.relay = Relay(self.tuns, delay, rate)
            self.relay.start()

    def close(self) -> None:
        """End what runs in the namespaces and remove all; again does nothing."""
        atexit.unregister(self.close)
        if self.relay is not None:
            self.relay.ending = True
            self.relay.join()
            self.relay = None
        while self.tuns:
            os.close(self.tuns.pop())
        remove(self.base)

    @contextlib.contextmanager
    def inside(self, rank: int) -> Iterator[None]:
        """Sockets that this thread makes here belong to a rank's namespace, also later."""
        libc = ctypes.CDLL(None, use_errno=True)
        with (
            open("/proc/thread-self/ns/net") as ours,
            open(f"/var/run/netns/{self.names[rank]}") as theirs,
        ):
            if libc.setns(theirs.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            try:
                yield
            finally:
                libc.setns(ours.fileno(), CLONE_NEWNET)

    def ping(self, count: int = 5, burst: int = 20) -> tuple[float, float, float]:
        """Seconds from rank 0 to rank 1 and there and back (medians), and bit/s of a burst of large
        packets.
        """
        ends = []
        for rank in (0, 1):
            with self.inside(rank):
                end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            end.bind((address(rank), PORT))
            end.setsockopt(
                socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22
            )  # a burst on a fast link comes all at once
            end.settimeout(30)
            ends.append(end)
        one_way, both_ways = [], []
        with ends[0], ends[1]:
            for _ in range(count):
                begin = time.monotonic()
                ends[0].sendto(b"?", (address(1), PORT))
                ends[1].recv(1)
                one_way.append(time.monotonic() - begin)
                ends[1].sendto(b"!", (address(0), PORT))
                ends[0].recv(1)
                both_ways.append(time.monotonic() - begin)
            size = MTU - 28  # headers of IP and UDP
            for _ in range(burst):
                ends[0].sendto(bytes(size), (address(1), PORT))
            arrivals = []
            for _ in range(burst):
                ends[1].recv(size)
                arrivals.append(time.monotonic())
        rate = 8 * MTU * (burst - 1) / (arrivals[-1] - arrivals[0])
        return statistics.median(one_way), statistics.median(both_ways), rate

    def run(self, command: Sequence[str]) -> int:
        """Run ranks to their end; as soon as one fails, end the others. Returns 0 or the first
        failure's status.
        """
        common = {
            "MASTER_ADDR": address(0), "MASTER_PORT": str(PORT), "WORLD_SIZE": str(self.ranks),
            "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }  # fmt: skip
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, name in enumerate(self.names):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                line = ["ip", "netns", "exec", name, *command]
                # Sessions of their own: ctrl-C reaches this process alone, which then ends them.
                processes.append(
                    subprocess.Popen(
                        line, env={**os.environ, **common, **own}, start_new_session=True
                    )
                )
            while True:
                codes = [process.poll() for process in processes]
                if failed := [code for code in codes if code]:
                    return failed[0] if failed[0] > 0 else 128 - failed[0]
                if None not in codes:
                    return 0
                time.sleep(0.05)
        finally:
            for process in processes:
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                for process in processes:
                    process.wait(GRACE)


def remove(base: str) -> None:
    """Remove all namespaces and links whose names begin so, and what runs there."""
    for name in re.findall(rf"^{base}-\S+", call("ip netns list"), re.MULTILINE):
        for process in call(f"ip netns pids {name}").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        with contextlib.suppress(subprocess.CalledProcessError):
            call(f"ip netns del {name}")
    for link in re.findall(rf"^\d+: ({base}[-v]\w+)", call("ip -o link"), re.MULTILINE):
        with contextlib.suppress(
            subprocess.CalledProcessError
        ):  # one end of a pair takes the other along
            call(f"ip link del {link}")


def sweep() -> None:
    """Remove what runs left that were killed."""
    for pid in set(re.findall(rf"\b{PREFIX}(\d+)[-v]", call("ip netns list") + call("ip -o link"))):
        if not Path("/proc", pid).exists():
            remove(f"{PREFIX}{pid}")


def main() -> None:
    """Make the network, measure it, run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--delay", help="one way, such as 50ms")
    parser.add_argument("--rate", help="each way, such as 100mbit")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    for given in filter(None, (arguments.delay, arguments.rate)):
        quantity(given)
    if reason := find_means(bool(arguments.delay or arguments.rate))[1]:
        print(f"skipped: {reason}")
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    network = Network(arguments.ranks, arguments.delay, arguments.rate)
    relay = network.relay
    try:
        if arguments.ranks > 1:
            one_way, both_ways, rate = network.ping()
            found = f"{one_way * 1e3:.2f} ms from rank 0 to rank 1"
            found += f", {both_ways * 1e3:.2f} ms there and back"
            asked = f"{arguments.delay or 'no'} delay, {arguments.rate or 'any'} rate"
            print(f"{network.means}: {found}, {rate / 1e6:.1f} Mbit/s (asked: {asked})", flush=True)
        begin = time.monotonic()
        code = network.run(arguments.command)
        if relay is not None:
            print(
                f"relay: {relay.used:.1f} s of processor time in {time.monotonic() - begin:.1f} s"
            )
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # nothing may stop the removal half way
        network.close()
    sys.exit(code)


if __name__ == "__main__":
    main()
