"""Long and rough runs of stages on several processes: kills, stalls, slow consumers, memory.

    python benchmarks/soak.py                           # all, into docs/soak.md: about 15 minutes
    python benchmarks/soak.py --only kills --kills 3
    python benchmarks/soak.py --quick                   # all, shortened: two minutes, no page

Every part starts its own processes with torchrun, watches them from outside, and checks a claim:

* ``kills``: kill -9 of each rank in turn at random moments; the run resumes by itself and ends with
  the weights of a run that nobody killed, bit for bit;
* ``saves``: killed while a checkpoint is being written; the one before still loads, and the end is
  the same;
* ``apart``: the same two with a folder for each rank, as on machines with disks of their own: a
  third of the kills soon after a start, a third after a save, a third while saving;
* ``hosts``: two torchruns joined on loopback, of which one comes late, goes, comes back, is started
  again or stands still for longer than the timeout; the run goes on with as many ranks as there
  are, and ends as in one process;
* ``link``: two ranks over a link with 50 ms each way and 100 Mbit/s, with saves; the end is that of
  one process (needs root, as ``netns.py`` says);
* ``stalls``: a stage that stalls at random for up to a second, queues that drop the oldest,
  synthetic inputs; the other stages lose less than 5 % of their updates, and nothing waits for
  ever;
* ``slow``: a consumer ten times slower than its producer, for both policies; the memory of no
  process grows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import dni_fx
from dni_fx import distributed
from hosts import hosts as hosts
from hosts import link as link
from probe import describe_environment

PARTS = ("kills", "saves", "apart", "hosts", "link", "stalls", "slow")
WIDTH, CLASSES, BATCH = 128, 10, 32


class Ladder(nn.Module):
    """Three linear layers, of which one can be made to dawdle; a skip from the first to the
    last.
    """

    def __init__(self, slow: str = "", seconds: float = 0.0, at_random: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.third, self.last = (
            Dawdle(seconds, at_random) if slow else nn.Identity(),
            nn.Linear(2 * WIDTH, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, WIDTH)`` to ``(batch, CLASSES)``."""
        a = self.first(x).relu()
        b = self.second(a).relu()
        return self.last(torch.cat([self.third(b), a], 1))


class Sleep(torch.autograd.Function):
    """The value itself, after a while: an operator of its own, since one without any would not be
    in the graph.
    """

    draw = random.Random(1)

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, at_random: bool) -> Tensor:
        """Always so many seconds, or in one batch of forty up to one."""
        if not at_random:
            time.sleep(seconds)
        elif Sleep.draw.random() < 1 / 40:
            time.sleep(Sleep.draw.random())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradient itself."""
        return gradients[0], None, None


class Dawdle(nn.Module):
    """Sleeps."""

    def __init__(self, seconds: float, at_random: bool) -> None:
        super().__init__()
        self.seconds, self.at_random = seconds, at_random

    def forward(self, x: Tensor) -> Tensor:
        """The value itself."""
        return Sleep.apply(x, self.seconds, self.at_random)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Of a step, the same in every process and after every restart."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    return x, x[:, :CLASSES].argmax(1)


# ---- what runs under torchrun --------------------------------------------------------------------


def work(options: dict[str, Any]) -> None:
    """One rank of a run, as the options say; rank 0 writes what came of it."""
    torch.set_num_threads(1)
    # A rank may be killed before all have met; where none is, the slow ones come last to the end by
    # far.
    rank, folder = distributed.start(30 if "every" in options else 3600), Path(options["folder"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    disk = os.environ.get("SOAK_DISK", rank) if options.get("apart") else "shared"
    saved = folder / f"disk-{disk}" / "checkpoints"
    if rank == 0:
        with (folder / "worlds").open("a") as file:
            file.write(f"{dist.get_world_size()}\n")
    torch.manual_seed(0)
    model = Ladder(
        options.get("slow", ""), options.get("seconds", 0.0), options.get("at_random", False)
    )
    decoupled = dni_fx.decouple(
        model,
        ["first", "second"],
        example_inputs=(batch(0)[0],),
        gradients="linear",
        inputs=options.get("inputs"),
        context=dni_fx.one_hot(CLASSES),
        check=False,
    )
    trainer = distributed.Trainer(
        decoupled,
        F.cross_entropy,
        optimizer=lambda p: torch.optim.Adam(p, 1e-3),
        staleness=options.get("staleness"),
        policy=options.get("policy", "wait"),
        queue=options.get("queue", 4),
        timeout=options.get("timeout", 60.0 if "every" in options else 3600.0),
    )
    if "every" in options:
        trainer.resume(saved)
    memory = []
    start = time.perf_counter()
    for step in range(trainer.steps, options["steps"]):
        x, y = batch(step)
        trainer.step(x, target=y)
        if (folder / "slowly").exists():
            time.sleep(0.2)
        if "every" in options and trainer.steps % options["every"] == 0:
            trainer.save(saved, asynchronous=options.get("asynchronous", False))
        if step % max(options["steps"] // 50, 1) == 0:
            memory.append(resident())
    seconds = time.perf_counter() - start
    rows = trainer.status(everywhere=True).rows if "every" not in options else ()
    state = trainer.gather()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {"memory": memory, "seconds": seconds})
    trainer.close()
    if rank == 0:
        answer = {"digest": digest(state), "rows": [dict(r) for r in rows], "ranks": found}
        (folder / "result.json").write_text(json.dumps(answer, default=str))
    dist.destroy_process_group()


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def digest(state: dict[str, Tensor]) -> str:
    """Of all weights, bit for bit."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode() + state[name].numpy().tobytes())
    return found.hexdigest()[:16]


# ---- what watches --------------------------------------------------------------------------------


class Watched:
    """A run under torchrun in a folder of its own."""

    def __init__(self, folder: Path, ranks: int, restarts: int = 0, **options: Any) -> None:
        folder.mkdir(parents=True)
        self.folder, self.ranks = folder, ranks
        start = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        work = ["--work", json.dumps({**options, "folder": str(folder)})]
        command = [sys.executable, "-m", "torch.distributed.run", *start, __file__, *work]
        self.log = (folder / "log").open("w")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=environment, start_new_session=True
        )

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def kill(self, rank: int) -> bool:
        """kill -9 of one rank, if it runs."""
        try:
            os.kill(int((self.folder / f"pid-{rank}").read_text()), signal.SIGKILL)
        except (OSError, ValueError):
            return False
        return True

    def result(self, seconds: float) -> dict[str, Any]:
        """Wait for the end."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise SystemExit(
                f"{self.folder}: did not end within {seconds:g} s; see its log"
            ) from None
        finally:
            self.log.close()
        if code:
            raise SystemExit(
                f"{self.folder}: ended with {code}:\n{(self.folder / 'log').read_text()[-3000:]}"
            )
        return dict(json.loads((self.folder / "result.json").read_text()))


def kills(folder: Path, quick: bool, count: int) -> list[str]:
    """Each rank in turn, at random moments."""
    steps, every, ranks = (400, 20, 2) if quick else (6000, 50, 3)
    options = {"steps": steps, "every": every, "staleness": 2}
    calm = Watched(folder / "calm", ranks, **options).result(600)
    rough = Watched(folder / "rough", ranks, restarts=count + 5, **options)
    draw, done = random.Random(0), 0
    while done < count and rough.is_running:
        pids = {
            (rough.folder / f"pid-{r}").read_text()
            for r in range(ranks)
            if (rough.folder / f"pid-{r}").exists()
        }
        time.sleep(1.0 + 2.0 * draw.random())
        now = {
            (rough.folder / f"pid-{r}").read_text()
            for r in range(ranks)
            if (rough.folder / f"pid-{r}").exists()
        }
        if len(now) == ranks and now == pids and rough.kill(done % ranks):
            done += 1
            deadline = time.monotonic() + 60
            while rough.is_running and time.monotonic() < deadline and _pids(rough) & now:
                time.sleep(0.05)
    found = rough.result(900)
    same = found["digest"] == calm["digest"]
    equal = "bit-equal to" if same else "DIFFER from"
    return [
        f"{done} kills of {count} asked, {ranks} ranks in turn, {steps} steps, a checkpoint every "
        f"{every}: resumed {done} times; final weights {equal} an unkilled run's"
    ]


def _newer(run: Watched, pattern: str = ".step-*.writing") -> Path | None:
    """A checkpoint that these very processes, not those before them, have begun or made."""
    for path in run.folder.glob(f"disk*/checkpoints/{pattern}"):
        try:
            if path.stat().st_mtime > max(p.stat().st_mtime for p in run.folder.glob("pid-*")):
                return path
        except OSError:  # it is complete by now
            continue
    return None


def _pids(run: Watched) -> set[str]:
    return {p.read_text() for p in run.folder.glob("pid-*")}


def saves(folder: Path, quick: bool, count: int) -> list[str]:
    """Whenever a checkpoint is being written."""
    steps, every, ranks = (300, 50, 2) if quick else (1000, 50, 2)
    lines = []
    for asynchronous in (False, True):
        options = {"steps": steps, "every": every, "staleness": 2, "asynchronous": asynchronous}
        name = "asynchronous" if asynchronous else "plain"
        calm = Watched(folder / f"{name} calm", ranks, **options).result(600)
        rough = Watched(folder / f"{name} rough", ranks, restarts=count + 5, **options)
        done, broken = 0, 0
        while done < min(count, 5) and rough.is_running:
            if (writing := _newer(rough)) and rough.kill(done % ranks):
                time.sleep(0.02)
                broken += writing.exists()
                done += 1
                before = _pids(rough)
                while rough.is_running and _pids(rough) & before:
                    time.sleep(0.02)
            time.sleep(0.001)
        found = rough.result(600)
        same = found["digest"] == calm["digest"]
        lines.append(
            f"{name} saves: {done} kills while one was written, {broken} of which left it "
            f"incomplete; final weights {'bit-equal to' if same else 'DIFFER from'} an unkilled "
            "run's"
        )
    return lines


def apart(folder: Path, quick: bool, count: int) -> list[str]:
    """Each rank in turn, each with a disk of its own."""
    steps, every, ranks = (300, 20, 2) if quick else (2400, 20, 3)
    lines, draw = [], random.Random(1)
    for asynchronous in (False, True):
        options = {"steps": steps, "every": every, "staleness": 2, "asynchronous": asynchronous}
        name = "asynchronous" if asynchronous else "plain"
        calm = Watched(folder / f"{name} calm", ranks, apart=True, **options).result(600)
        asked = (count + asynchronous) // 2
        rough = Watched(folder / f"{name} rough", ranks, asked + 5, apart=True, **options)
        done, saving, before = 0, 0, set[str]()
        while done < asked and rough.is_running:
            now = _pids(rough)
            if len(now) < ranks or now & before:
                time.sleep(0.02)
                continue
            patterns = ((), ("step-*",), ("step-*", ".step-*.writing"))[done % 3]
            time.sleep(2.0 * draw.random() if not patterns else 0.0)
            for pattern in patterns:
                while rough.is_running and _newer(rough, pattern) is None:
                    time.sleep(0.001)
                time.sleep(draw.random() if pattern[0] != "." else 0.0)
            if _pids(rough) == now and rough.kill(done % ranks):
                saving += done % 3 == 2
                done, before = done + 1, now
        found = rough.result(900)
        same = "bit-equal to" if found["digest"] == calm["digest"] else "DIFFER from"
        left = [p.name for p in rough.folder.glob("disk*/checkpoints/.*")]
        lines.append(
            f"{name} saves: {done} kills of {asked} asked, {saving} of them while saving, {ranks} "
            f"ranks in turn with a folder each, {steps} steps: resumed {done} times; final weights "
            f"{same} an unkilled run's; files left behind: {', '.join(left) or 'none'}"
        )
    return lines


def stalls(folder: Path, quick: bool, count: int) -> list[str]:
    """The middle stage sleeps now and then."""
    steps = 500 if quick else 10_000
    options = {"steps": steps, "policy": "drop_oldest", "inputs": "mlp", "queue": 4}
    found = Watched(folder / "stalls", 3, slow="third", at_random=True, **options).result(3600)
    lines = [f"{steps} steps on 3 ranks, the last stage stalls in one batch of 40 for up to 1 s:"]
    for row in found["rows"]:
        lost = 1 - row["updates"] / steps
        lines.append(f"  {row['stage']}: {row['updates']} updates, {lost:.1%} lost")
    return lines


def slow(folder: Path, quick: bool, count: int) -> list[str]:
    """The last stage needs ten times as long as the others."""
    lines = []
    for policy in ("wait", "drop_oldest"):
        steps = (300 if policy == "wait" else 1000) if quick else 10_000
        found = Watched(
            folder / policy, 3, steps=steps, policy=policy, slow="third", seconds=0.02
        ).result(3600)
        for row, rank in zip(found["rows"], found["ranks"], strict=True):
            memory = rank["memory"]
            fifth = max(len(memory) // 5, 1)
            early, late = max(memory[fifth : 2 * fifth]), max(memory[-fifth:])
            lines.append(
                f"{policy}, {steps} steps, {row['stage']}: {row['updates']} updates, "
                f"{row['missed']} left out, {early / 2**20:.1f} MiB in the second fifth of the "
                f"run, {late / 2**20:.1f} MiB in the last"
            )
    return lines


def write(path: Path, name: str, found: list[str]) -> None:
    """Put a part's lines into the report, which keeps those of the others."""
    known = path.read_text().split("\n## ")[1:] if path.exists() else []
    parts = {text.split("\n", 1)[0]: text.split("\n", 1)[1].strip() for text in known}
    command = f"`python benchmarks/soak.py --only {name}`; {describe_environment()}"
    parts[name] = "\n".join([command, "", "```", *found, "```"])
    order = dict.fromkeys(n for n in (*PARTS, *parts) if n in parts)  # others are put in by hand
    head = (
        "# Long and rough runs\n\nWhat each part does stands at the head of `benchmarks/soak.py`.\n"
    )
    path.write_text(head + "".join(f"\n## {n}\n\n{parts[n]}\n" for n in order))


def main() -> None:
    """Run the parts and write what they found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--quick", action="store_true", help="shorter; nothing is written")
    parser.add_argument("--out", type=Path, default=Path("docs/soak.md"))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work))
        return
    folder = Path(tempfile.mkdtemp(prefix="dni_fx_soak_"))
    try:
        for name in options.only:
            start = time.perf_counter()
            found = globals()[name](
                folder / name, options.quick, 3 if options.quick else options.kills
            )
            print(f"{name} ({time.perf_counter() - start:.0f} s)", *found, sep="\n", flush=True)
            if not options.quick:
                write(options.out, name, found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
