"""Before a long run: is every rank's machine fit for it, and are they all the same?

    launch/pretrain_kvpo.sh RECIPE --module tools.preflight [--topology NAME] [--output FILE.json]
    torchrun --nproc_per_node 8 -m tools.preflight RECIPE [section.key=value ...]

Started as the run will be, with the same recipe, overrides and topology. Looks at GPUs, driver and
NCCL, links, space, clocks, versions and code, the checkpoint folder, the scorers of
reward.service.urls, and does one update of the recipe at reduced size. Prints a table, and one JSON
line at the end; --output keeps what every rank found. What does not apply is said to be left out.
Ends with 0 if nothing failed, 1 if something did, 2 for arguments that cannot work.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_kvpo import log
from megatron_kvpo.config import RunConfig, load_config
from tools import preflight_probes as probes
from tools import preflight_update, provenance
from tools import topology as topologies
from tools.preflight_verdicts import (
    Check,
    Limits,
    check_folder,
    check_gpus,
    check_links,
    check_space,
    check_versions,
    left_out,
    verdict,
)
from tools.topology import Topology

logger = log.get_logger("megatron_kvpo.tools.preflight")

_GROUND = ("versions", "settings", "gpu", "all-reduce", "all-reduce in node")
"""Checks without which an update is not worth trying."""

_NAME_COLUMNS = 18


def measure_links(
    device: torch.device, topology: Topology | None
) -> tuple[dict[str, Any], dict[str, float]]:
    """All-reduces over the node and over all ranks, pairs of GPUs, and what is expected of them."""
    world = dist.get_world_size()
    local = probes.local_world(topology.gpus_per_node if topology else world)
    nodes = [list(range(a, min(a + local, world))) for a in range(0, world, local)]
    found: dict[str, Any] = {}
    if len(nodes) > 1 and local > 1:
        groups = [dist.new_group(ranks) for ranks in nodes]
        mine = dist.get_rank() // local
        found["all-reduce in node"] = probes.all_reduce_gb_s(device, groups[mine], nodes[mine])
    found["all-reduce"] = probes.all_reduce_gb_s(device, None, list(range(world)))
    if device.type != "cuda" or topology is None:
        return found, {}
    pair = probes.pair_gb_s(device, local)
    found["pair"] = None if pair is None else {"gb_s": pair, "right": True}
    between = topology.ib_gb_s * topology.gpus_per_node
    nvlink = topology.nvlink_gb_s
    whole = min(nvlink or between, between) if len(nodes) > 1 else nvlink
    return found, {"all-reduce in node": nvlink, "pair": nvlink, "all-reduce": whole}


def examine(
    config: RunConfig, topology: Topology | None, limits: Limits, device: torch.device,
    words: probes.Group,
) -> tuple[list[Check], list[dict[str, Any]]]:  # fmt: skip
    """Every check but the update, and what every rank found: the same on all. Collective."""
    world = dist.get_world_size()
    facts = probes.gathered(
        {"host": probes.host(), "versions": probes.versions(), "gpu": probes.gpu(device),
         "recipe": probes.recipe_hash(config), "space": probes.space(config.run_folder)}, words,
    )  # fmt: skip
    hosts = [fact["host"] for fact in facts]
    checks = [*check_versions(facts, hosts), *check_gpus(facts, topology, hosts),
              *check_space(facts, limits, hosts)]  # fmt: skip
    folder = config.run_folder / "checkpoints"
    checks.append(check_folder(
        probes.gathered(probes.shared_folder(folder, words), words), folder, hosts
    ))  # fmt: skip
    ahead = probes.gathered(probes.clock_ahead_s(words), words)
    late = {rank: f"its clock is {s:+.2f} s from rank 0's: let NTP set it"
            for rank, s in enumerate(ahead) if abs(s) > limits.skew_s}  # fmt: skip
    checks.append(verdict("clock", late, f"within {max(map(abs, ahead)):.3f} s", hosts))
    if world > 1:
        mine, expected = measure_links(device, topology)
        links = probes.gathered(mine, words)
        facts = [{**fact, "links": link} for fact, link in zip(facts, links, strict=True)]
        checks += check_links(links, expected, limits.bandwidth, hosts)
    else:
        checks.append(left_out("all-reduce", "there is 1 rank"))
    checks.append(ask_scorers(config, limits, words, hosts))
    return checks, facts


def ask_scorers(
    config: RunConfig, limits: Limits, words: probes.Group, hosts: Sequence[str]
) -> Check:
    """Whether every rank reaches scorers of all components. Collective."""
    service = config.reward.service
    if not service.urls:
        how = "each rank starts its own" if service.spawn else "the ranks score themselves"
        return left_out("scorers", f"reward.service.urls is empty: {how}")
    said = probes.gathered(probes.scorers(config, limits.scorer_s), words)
    faults = {rank: fault for rank, fault in enumerate(said) if fault is not None}
    return verdict("scorers", faults, f"{len(service.urls)} answer, with all components", hosts)


def try_update(
    config: RunConfig, before: Sequence[Check], device: torch.device, words: probes.Group,
    facts: Sequence[dict[str, Any]],
) -> Check:  # fmt: skip
    """One small update, unless what it stands on has failed already. Collective."""
    name = "one update"
    broken = [c.name for c in before if c.status == "FAIL" and c.name in _GROUND]
    if broken:
        return left_out(name, f"{broken} failed: see to that first")
    world, fault, seconds = dist.get_world_size(), None, 0.0
    try:
        seconds = preflight_update.update_s(config, world, gpu=device.type == "cuda")
    except (ValueError, RuntimeError, OSError) as error:
        fault = f"{type(error).__name__}: {error}"
        logger.error("rank %d, one update: %s", dist.get_rank(), fault)  # others may not come back
    said = probes.gathered((fault, seconds), words)
    faults = {rank: why for rank, (why, _) in enumerate(said) if why is not None}
    slowest = max(took for _, took in said)
    hosts = [fact["host"] for fact in facts]
    return verdict(name, faults, f"at reduced size, {slowest:.1f} s, its alarms on", hosts)


def show(checks: Sequence[Check]) -> None:
    """Lines of the table."""
    for check in checks:
        say: Callable[..., None] = logger.error if check.status == "FAIL" else logger.info
        say("%-8s  %-*s  %s", check.status, _NAME_COLUMNS, check.name, check.detail)


def join(config: RunConfig) -> tuple[torch.device, probes.Group]:
    """This rank's device, and a group for words. Collective.

    ValueError: as many ranks cannot be divided by the recipe's layout, or no device is left.
    """
    from megatron_kvpo.parallel.groups import check_sizes, choose_device, start_processes

    check_sizes(int(os.environ.get("WORLD_SIZE", "1")), config.parallel)
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.parallel.timeout_s)
    start_processes(device, timeout)
    return device, dist.new_group(backend="gloo", timeout=timeout)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check everything, print, write; 1 if something failed."""
    options = _parse(arguments)
    limits = Limits(disk_gib=options.disk_gib, shared_memory_gib=options.shared_memory_gib,
                    skew_s=options.skew_s, bandwidth=options.bandwidth,
                    scorer_s=options.scorer_s)  # fmt: skip
    topology = topologies.load(options.topology) if options.topology else None
    config = load_config(options.recipe, options.overrides)
    device, words = join(config)
    first = dist.get_rank() == 0
    log.setup(first)
    checks, facts = examine(config, topology, limits, device, words)
    show(checks if first else [])
    checks.append(try_update(config, checks, device, words, facts))
    show(checks[-1:] if first else [])
    failed = [check.name for check in checks if check.status == "FAIL"]
    if first:
        _write(options, checks, facts)
    if not failed:  # else NCCL could wait here for a collective that some rank has left
        dist.destroy_process_group()
    return 1 if failed else 0


def _write(
    options: argparse.Namespace, checks: Sequence[Check], facts: Sequence[dict[str, Any]]
) -> None:
    listed = [asdict(check) for check in checks]
    if options.output is not None:
        head = provenance.made_by("tools.preflight", len(facts))
        record = {**head, "topology": options.topology, "checks": listed, "ranks": facts}
        provenance.write_json(record, options.output)
    failed = {check.name: check.ranks for check in checks if check.status == "FAIL"}
    log.emit_result(json.dumps({"ok": not failed, "failed": failed, "ranks": len(facts)}))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    limits = Limits()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--topology", default=os.environ.get("TOPOLOGY") or None)
    parser.add_argument("--output", type=Path, help="a .json file")
    parser.add_argument("--disk-gib", type=float, default=limits.disk_gib)
    parser.add_argument("--shared-memory-gib", type=float, default=limits.shared_memory_gib)
    parser.add_argument("--skew-s", type=float, default=limits.skew_s)
    parser.add_argument("--bandwidth", type=float, default=limits.bandwidth,
                        help="share of the topology's link speed that must be reached")  # fmt: skip
    parser.add_argument("--scorer-s", type=float, default=limits.scorer_s)
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    log.run_command(main, logger)
