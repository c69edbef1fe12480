"""What tools/preflight.py makes of what ranks found: a line a check, naming who is at fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tools.topology import Topology

_BAD_REASONS = {0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal",
                0x80: "power brake"}  # fmt: skip
"""Bits of the driver's reasons to lower clocks that do not come from load alone."""

_FOREIGN_GIB = 2.0
"""A context and NCCL's buffers take less; more on an idle GPU is another process."""

_MEMORY_SHARE = 0.97


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """From where on something counts as wrong."""

    disk_gib: float = 20.0
    shared_memory_gib: float = 1.0
    skew_s: float = 1.0
    bandwidth: float = 0.5
    """Share of the topology's link speed that an all-reduce must reach."""

    scorer_s: float = 20.0

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in asdict(self).items() if value <= 0}
        if wrong:
            raise ValueError(f"limits {wrong} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    status: Literal["ok", "FAIL", "left out"]
    detail: str
    ranks: list[int] = field(default_factory=list)
    """That are at fault."""


def verdict(name: str, faults: dict[int, str], fine: str, hosts: Sequence[str]) -> Check:
    """`fine`, or what is wrong with which ranks."""
    if not faults:
        return Check(name=name, status="ok", detail=fine)
    said: dict[str, list[int]] = {}
    for rank, fault in sorted(faults.items()):
        said.setdefault(fault, []).append(rank)
    detail = "; ".join(
        ", ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks) + f": {fault}"
        for fault, ranks in said.items()
    )
    return Check(name=name, status="FAIL", detail=detail, ranks=sorted(faults))


def left_out(name: str, why: str) -> Check:
    """A check that does not apply here."""
    return Check(name=name, status="left out", detail=why)


def odd_ones(values: Sequence[Any], what: str) -> dict[int, str]:
    """Ranks that differ from most; of a tie the earlier rank's value counts."""
    common = Counter(map(str, values)).most_common(1)[0][0]
    return {rank: f"{what} is {value}, elsewhere {common}"
            for rank, value in enumerate(values) if str(value) != common}  # fmt: skip


def check_versions(facts: Sequence[dict[str, Any]], hosts: Sequence[str]) -> list[Check]:
    """Packages, code and settings are the same everywhere."""
    faults: dict[int, str] = {}
    for name in facts[0]["versions"]:
        for rank, fault in odd_ones([f["versions"][name] for f in facts], name).items():
            faults[rank] = f"{faults[rank]}, {fault}" if rank in faults else fault
    fine = ", ".join(f"{name} {value[:12]}" for name, value in facts[0]["versions"].items())
    recipes = odd_ones([f["recipe"] for f in facts], "the hash of all settings")
    return [verdict("versions", faults, fine, hosts),
            verdict("settings", recipes, "the same on all ranks", hosts)]  # fmt: skip


def check_space(
    facts: Sequence[dict[str, Any]], limits: Limits, hosts: Sequence[str]
) -> list[Check]:
    """Free GiB of the run's folder and of /dev/shm."""
    checks = []
    for name, least in (("disk", limits.disk_gib), ("shared memory", limits.shared_memory_gib)):
        free = [fact["space"][name] for fact in facts]
        known = [value for value in free if value is not None]
        faults = {rank: f"{value:.1f} GiB are free, {least:g} are wanted"
                  for rank, value in enumerate(free)
                  if value is not None and value < least}  # fmt: skip
        checks.append(
            verdict(name, faults, f"{min(known):.0f} GiB are free", hosts)
            if known else left_out(name, "there is none here")
        )  # fmt: skip
    return checks


def check_gpus(
    facts: Sequence[dict[str, Any]], topology: Topology | None, hosts: Sequence[str]
) -> list[Check]:
    """Model, memory, health and peers of every GPU."""
    names = ("gpu", "gpu health", "driver", "peer to peer")
    gpus = [fact["gpu"] for fact in facts]
    if None in gpus:
        cpu = {rank: "no GPU, others have one" for rank, gpu in enumerate(gpus) if gpu is None}
        if len(cpu) < len(gpus):
            return [verdict("gpu", cpu, "", hosts)]
        return [left_out(name, "the ranks are on CPUs") for name in names]
    model = odd_ones([gpu["name"] for gpu in gpus], "the GPU")
    unfit = {rank: fault for rank, gpu in enumerate(gpus) if (fault := _unfit(gpu, topology))}
    cut_off = {rank: f"does not reach GPUs {gpu['unreached']} of its node"
               for rank, gpu in enumerate(gpus) if gpu["unreached"]}  # fmt: skip
    fine = f"{gpus[0]['name']}, {min(gpu['memory_gib'] for gpu in gpus):.0f} GiB"
    return [
        verdict("gpu", unfit | model, fine, hosts),
        *_check_health([gpu["smi"] for gpu in gpus], hosts),
        verdict("peer to peer", cut_off, "every GPU reaches those that it sees", hosts),
    ]


def _unfit(gpu: dict[str, Any], topology: Topology | None) -> str:
    if gpu["used_gib"] > _FOREIGN_GIB:
        return f"{gpu['used_gib']:.1f} GiB are taken already: another process is on this GPU"
    if topology is None:
        return ""
    if topology.gpu not in gpu["name"]:
        return f"the GPU is {gpu['name']}, the topology says {topology.gpu}"
    if gpu["memory_gib"] < _MEMORY_SHARE * topology.gpu_memory_gib:
        return (f"the GPU has {gpu['memory_gib']:.1f} GiB, the topology says "
                f"{topology.gpu_memory_gib:g}")  # fmt: skip
    return ""


def _check_health(said: Sequence[dict[str, Any] | None], hosts: Sequence[str]) -> list[Check]:
    known = {rank: smi for rank, smi in enumerate(said) if smi is not None}
    if not known:
        return [left_out(name, "nvidia-smi does not answer") for name in ("gpu health", "driver")]
    faults = {}
    for rank, smi in known.items():
        bits = [word for bit, word in _BAD_REASONS.items() if (smi["reasons"] or 0) & bit]
        if smi["errors"]:
            faults[rank] = f"{smi['errors']} uncorrected memory errors: drain the node, reset it"
        elif bits:
            faults[rank] = f"its clocks are lowered ({', '.join(bits)}): look at cooling and power"
    hottest = max((smi["temperature"] or 0 for smi in known.values()), default=0)
    silent = f"; no answer on {len(said) - len(known)} ranks" if len(known) < len(said) else ""
    fine = f"no uncorrected errors, at most {hottest} degrees{silent}"
    drivers = [smi["driver"] if smi else "unknown" for smi in said]
    return [verdict("gpu health", faults, fine, hosts),
            verdict("driver", odd_ones(drivers, "the driver"), drivers[0], hosts)]  # fmt: skip


def check_links(
    found: Sequence[dict[str, Any]], expected: dict[str, float], share: float, hosts: Sequence[str]
) -> list[Check]:
    """All-reduces are right, and as fast as `share` of what is expected; 0 expects nothing."""
    checks = []
    for name in found[0]:
        results = [fact[name] for fact in found if fact[name] is not None]
        least = share * expected.get(name, 0.0)
        faults: dict[int, str] = {}
        for rank, fact in enumerate(found):
            if (link := fact[name]) is None:
                continue
            if not link["right"]:
                faults[rank] = "the sum is wrong: do not train on this"
            elif link["gb_s"] < least:
                faults[rank] = f"{link['gb_s']:.3g} GB/s, the topology promises {least:.3g}"
        slowest = min((link["gb_s"] for link in results), default=0.0)
        judged = f"at least {least:.3g}" if least else "no expectation: no topology's speed"
        checks.append(verdict(name, faults, f"{slowest:.3g} GB/s ({judged})", hosts))
    return checks


def check_folder(found: Sequence[dict[str, Any]], folder: Path, hosts: Sequence[str]) -> Check:
    """Every rank writes there, and all see one folder."""
    faults = {rank: f"cannot write into {folder}: {f['fault']}"
              for rank, f in enumerate(found) if f["fault"]}  # fmt: skip
    faults |= {rank: f"does not see in {folder} what ranks {f['unseen']} wrote: it is not shared"
               for rank, f in enumerate(found) if f["unseen"]}  # fmt: skip
    return verdict("checkpoint folder", faults, f"{folder}, one for all ranks", hosts)
