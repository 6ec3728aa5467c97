"""Measures cases: ours, plain torch, the peers and the floor, interleaved in one process.

A family declares `Case`s; nothing here knows what they compute. All contenders of a case run back to back in
every round, in alternating order, and ratios are taken inside a round, so that a machine whose speed drifts shifts
both sides of a ratio alike. Medians are over rounds.
"""
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as synchronized_time

LOST = 0.95  # below this ratio plain torch is the faster one, beyond the noise
PATIENCE = 10.0  # seconds: a contender that takes longer than this is timed once


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Case:
    """One line of the table. `reference` is the plain torch way that users run now; `None` for no such way.

    `flops` is the least work the method needs, by the dtype of the products that could do it (the fastest counts);
    `bytes` what it must read and write once; with `reads`, what it must read, where next to nothing is written.
    `error` maps a contender's result to its distance from float64; see `relative_error`.
    """

    op: str
    shape: str
    dtype: torch.dtype
    ours: Callable[[], Any]
    reference: Callable[[], Any] | None = None
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    flops: dict[torch.dtype, float] = field(default_factory=dict)
    bytes: float = 0.0
    reads: bool = False
    error: Callable[[Any], float] | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, self.shape, dtype_name(self.dtype), self.variant)))


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    threads: int = 1
    quick: bool = False

    @property
    def clock(self) -> str:
        """One CPU thread is timed by its own CPU time, which other processes do not disturb."""
        return "process CPU time" if self.device == "cpu" and self.threads == 1 else "wall clock"

    @property
    def seconds(self) -> float:  # a contender's share of a case
        return 0.2 if self.quick else 1.0 if self.device == "cpu" else 0.3


def relative_error(exact: Callable[[], Tensor]) -> Callable[[Tensor], float]:
    """||y - exact|| / ||exact|| in float64 (Frobenius); `exact` is evaluated once, when first needed."""
    known: list[Tensor] = []

    def error(y: Tensor) -> float:
        if not known:
            known.append(exact())
        return float((y.double() - known[0]).norm() / known[0].norm())

    return error


class Stopwatch:
    """Times calls of one contender."""

    def __init__(self, f: Callable[[], Any], settings: Settings) -> None:
        self._f = f
        self._clock = time.process_time if settings.clock == "process CPU time" else synchronized_time
        self._timer = Timer("f()", globals={"f": f}, num_threads=settings.threads, timer=self._clock)
        self.once = self._single()
        if self.once < settings.seconds / 5:
            self.once = max(self._timer.timeit(1).mean, 1e-7)

    def _single(self) -> float:
        start = self._clock()
        self._f()
        return self._clock() - start

    def burst(self, seconds: float) -> float:
        """The mean of a burst of calls that lasts about `seconds`; Timer warms up before it, with two calls at least,
        which a single slow call is spared."""
        calls = max(1, min(round(seconds / self.once), 100_000))
        return self._single() if calls == 1 else self._timer.timeit(calls).mean


class Floor:
    """The least time a case could take on this machine: FLOPs at the rate of torch's best product, or a copy (or a
    read) of as many bytes, whichever is longer. The rates of products are measured once, at the first case that needs
    one; the copy is a contender of its case."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.gemm: dict[str, float] = {}  # FLOP/s

    def _best(self, f: Callable[[], Any]) -> float:
        watch = Stopwatch(f, self.settings)
        return min(watch.burst(self.settings.seconds / 5) for _ in range(5))

    def _gemm(self, dtype: torch.dtype) -> float:
        name = dtype_name(dtype)
        if name not in self.gemm:
            sizes = (512, 1024) if self.settings.device == "cpu" else (4096,)
            rates = []
            for n in sizes:
                a = torch.randn(n, n, device=self.settings.device).to(dtype)
                out = torch.empty_like(a)
                rates.append(2 * n**3 / self._best(lambda a=a, out=out: torch.mm(a, a, out=out)))
            self.gemm[name] = max(rates)
        return self.gemm[name]

    def compute(self, case: Case) -> float:
        return min((work / self._rate(dtype) for dtype, work in case.flops.items()), default=0.0)

    def _rate(self, dtype: torch.dtype) -> float:
        # What has 16 bits can be multiplied in float32 as well: without instructions for it that is far faster.
        return max(self._gemm(d) for d in ((dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)))

    def transfer(self, case: Case) -> Callable[[], Any] | None:
        if not case.bytes:
            return None
        if case.reads:  # a sum of integers is the fastest pure read that torch has
            source = torch.ones(max(1, int(case.bytes) // 8), dtype=torch.int64, device=self.settings.device)
            return lambda: source.sum()
        source = torch.zeros(max(1, int(case.bytes) // 2), dtype=torch.uint8, device=self.settings.device)
        target = torch.empty_like(source)  # half is read, half is written
        return lambda: target.copy_(source)


def measure(case: Case, floor: Floor) -> dict[str, Any]:
    """Runs one case; times in seconds, ratios relative to ours (above 1: ours is faster)."""
    settings = floor.settings
    contenders = {"ours": case.ours}
    if case.reference is not None:
        contenders["torch"] = case.reference
    contenders |= case.peers
    errors = {name: case.error(f()) for name, f in contenders.items()} if case.error else {}
    compute, transfer = floor.compute(case), floor.transfer(case)
    timed = contenders | ({"floor": transfer} if transfer else {})
    watches = {name: Stopwatch(f, settings) for name, f in timed.items()}
    # Many short bursts beat few long ones on a shared machine.
    times = {name: [watch.once] for name, watch in watches.items() if watch.once > PATIENCE and name != "ours"}
    repeated = [name for name in watches if name not in times]
    slowest = max(watches[name].once for name in repeated)
    rounds = max(3, min(5 if settings.quick else 11, int(settings.seconds / slowest)))
    times |= {name: [] for name in repeated}
    for i in range(rounds):
        for name in repeated[:: -1 if i % 2 else 1]:
            times[name].append(watches[name].burst(settings.seconds / rounds))
    ratios = {
        name: median(theirs / ours for theirs, ours in zip(times[name] if name in repeated else times[name] * rounds,
                                                           times["ours"], strict=True))
        for name in timed
        if name != "ours"
    }
    of_floor = ratios.pop("floor", 0.0)
    return {
        "name": case.name,
        "op": case.op,
        "shape": case.shape,
        "dtype": dtype_name(case.dtype),
        "variant": case.variant,
        "seconds": {name: median(times[name]) for name in contenders},
        "ratios": ratios,
        "lost": ratios.get("torch", LOST) < LOST,
        "errors": errors,
        "floor": max(compute, median(times["floor"]) if transfer else 0.0),
        "of_floor": max(of_floor, compute / median(times["ours"])),
        "flops": {dtype_name(dtype): work for dtype, work in case.flops.items()},
        "bytes": case.bytes,
        "bursts": times,
    }


def machine(settings: Settings) -> dict[str, Any]:
    """What the figures depend on."""
    info: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradops": version("gradops"),
        "isa": torch.ops.gradops.isa(),
        "device": settings.device,
        "threads": settings.threads,
        "clock": settings.clock,
        "quick": settings.quick,
    }
    if settings.device == "cuda":
        info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return info


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run(cases: Iterator[Case], floor: Floor) -> Iterator[dict[str, Any]]:
    """Measures case by case; a generator of cases keeps only one case's tensors alive. A case that raises is a result
    with "failed" instead of figures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(floor.settings.threads)
    try:
        for case in cases:
            try:
                result = measure(case, floor)
            except Exception as error:  # one broken case must not cost the figures of the others
                result = {"name": case.name, "failed": f"{type(error).__name__}: {error}"}
            yield result
    finally:
        torch.set_num_threads(threads)
