"""The check before a run: every injected fault is found, and laid on the rank that has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_kvpo import log
from megatron_kvpo.config import RunConfig, load_config
from megatron_kvpo.training.parts import check_run
from tests.end_to_end.test_run import TRAINED
from tests.parallel.tiny_run import tiny_config, write_recipe
from tests.ranks import on_ranks
from tests.unit.fake_scorer import Noting, free_port, serving
from tools import preflight, preflight_update
from tools.preflight_probes import parse_smi
from tools.preflight_verdicts import (
    Limits,
    check_gpus,
    check_links,
    check_space,
    check_versions,
    odd_ones,
)
from tools.topology import Topology

ROOT = Path(__file__).parents[2]
NOBODY = 65534
HOSTS = ["a", "b", "c"]
SMI = {"driver": "580.1", "errors": 0, "temperature": 31, "reasons": 0x1}
GPU = {"name": "NVIDIA H200", "memory_gib": 139.7, "used_gib": 0.6, "unreached": [], "smi": SMI}
H200 = Topology(gpus_per_node=3, gpu="H200", gpu_memory_gib=139)


def gpu_checks(*changes: dict[str, Any], topology: Topology | None = H200) -> dict[str, Any]:
    facts = [{"gpu": {**GPU, **change}} for change in changes]
    return {check.name: check for check in check_gpus(facts, topology, HOSTS)}


def test_gpus_that_are_alike_and_well_pass():
    found = gpu_checks({}, {}, {})
    assert [check.status for check in found.values()] == ["ok"] * 4
    assert "NVIDIA H200, 140 GiB" in found["gpu"].detail


@pytest.mark.parametrize(
    ("check", "change", "words"),
    [
        ("gpu", {"name": "NVIDIA H100"}, "elsewhere NVIDIA H200"),
        ("gpu", {"memory_gib": 70.0}, "the GPU has 70.0 GiB, the topology says 139"),
        ("gpu", {"used_gib": 30.0}, "30.0 GiB are taken already: another process"),
        ("gpu health", {"smi": {**SMI, "errors": 3}}, "3 uncorrected memory errors"),
        ("gpu health", {"smi": {**SMI, "reasons": 0x41}}, "clocks are lowered (hardware thermal)"),
        ("driver", {"smi": {**SMI, "driver": "570.9"}}, "the driver is 570.9, elsewhere 580.1"),
        ("driver", {"smi": None}, "the driver is unknown"),
        ("peer to peer", {"unreached": [0]}, "does not reach GPUs [0]"),
    ],
)
def test_a_gpu_that_differs_is_named(check, change, words):
    found = gpu_checks({}, change, {})
    assert (found[check].status, found[check].ranks) == ("FAIL", [1])
    assert "rank 1 (b): " in found[check].detail
    assert words in found[check].detail


def test_all_gpus_may_be_other_ones_than_the_topology_says():
    found = gpu_checks(*[{"name": "NVIDIA H100"}] * 3)
    assert found["gpu"].ranks == [0, 1, 2]
    assert gpu_checks(*[{"name": "NVIDIA H100"}] * 3, topology=None)["gpu"].status == "ok"


def test_load_is_no_fault_and_what_nobody_says_is_left_out():
    busy = gpu_checks(*[{"smi": {**SMI, "reasons": 0x4}}] * 3)
    assert busy["gpu health"].status == "ok"
    silent = gpu_checks(*[{"smi": None}] * 3)
    assert {silent[name].status for name in ("gpu health", "driver")} == {"left out"}
    assert {c.status for c in check_gpus([{"gpu": None}] * 2, H200, HOSTS)} == {"left out"}
    (mixed,) = check_gpus([{"gpu": GPU}, {"gpu": None}], H200, HOSTS)
    assert (mixed.status, mixed.ranks) == ("FAIL", [1])


def test_what_nvidia_smi_says_is_read():
    assert parse_smi("580.159.04, 0, 31, 0x0000000000000041\n") == {
        "driver": "580.159.04", "errors": 0, "temperature": 31, "reasons": 0x41,
    }  # fmt: skip
    assert parse_smi("570.1, [N/A], 40, [N/A]") == {
        "driver": "570.1", "errors": None, "temperature": 40, "reasons": None,
    }  # fmt: skip
    assert parse_smi("") is parse_smi("No devices were found") is None


def test_slow_and_wrong_links_are_named():
    good, slow, wrong = ({"gb_s": 300.0, "right": True}, {"gb_s": 20.0, "right": True},
                         {"gb_s": 300.0, "right": False})  # fmt: skip
    found = [{"all-reduce": good, "pair": good}, {"all-reduce": slow, "pair": None},
             {"all-reduce": wrong, "pair": slow}]  # fmt: skip
    whole, pair = check_links(found, {"all-reduce": 450.0}, 0.5, HOSTS)
    assert (whole.status, whole.ranks) == ("FAIL", [1, 2])
    assert "rank 1 (b): 20 GB/s, the topology promises 225" in whole.detail
    assert "rank 2 (c): the sum is wrong" in whole.detail
    assert (pair.status, "no expectation" in pair.detail) == ("ok", True)


def test_space_that_runs_out_is_named_and_what_is_not_there_left_out():
    facts = [{"space": {"disk": 500.0, "shared memory": None}},
             {"space": {"disk": 1.0, "shared memory": None}}]  # fmt: skip
    disk, memory = check_space(facts, Limits(disk_gib=20), HOSTS)
    assert (disk.status, disk.ranks, memory.status) == ("FAIL", [1], "left out")
    assert "1.0 GiB are free, 20 are wanted" in disk.detail
    with pytest.raises(ValueError, match=r"\{'disk_gib': 0\} must be above 0"):
        Limits(disk_gib=0)


def test_one_rank_with_other_versions_is_named_with_all_of_them():
    same = {"versions": {"torch": "2.13.0", "commit": "abc"}, "recipe": "1"}
    other = {"versions": {"torch": "2.12.0", "commit": "abd"}, "recipe": "1"}
    versions, recipe = check_versions([same, same, other], HOSTS)
    assert (versions.ranks, recipe.status) == ([2], "ok")
    assert "torch is 2.12.0, elsewhere 2.13.0, commit is abd, elsewhere abc" in versions.detail
    assert odd_ones([1, 2], "x") == {1: "x is 2, elsewhere 1"}
    _, settings = check_versions([same, {**same, "recipe": "2"}], HOSTS)
    assert settings.ranks == [1]


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples" / "wan").glob("*l*_1*.yaml")))
def test_the_reduced_recipe_keeps_layout_and_method_and_needs_no_files(recipe, tmp_path):
    if recipe.name.startswith(("pretrain", "few_step")):
        pytest.skip("is not a KVPO recipe")
    whole = load_config(recipe)
    world = 2 * whole.parallel.tensor * whole.parallel.branch
    for gpu in (False, True):
        small = preflight_update.reduced(whole, world, tmp_path, gpu=gpu)
        prompts, held_out = check_run(small)
        assert (len(prompts), held_out) == (2, [])
        assert (small.routing, small.energy, small.alarms) == (
            whole.routing, whole.energy, whole.alarms,
        )  # fmt: skip
        assert (small.model.dtype, small.model.num_heads) == (
            whole.model.dtype,
            whole.model.num_heads,
        )
        assert small.model.head_dim == (whole.model.head_dim if gpu else 16)
        assert small.stream.num_frames < whole.stream.num_frames


def _examined(config: RunConfig, user: int = 0) -> dict[str, tuple[str, list[int], str]]:
    device, words = preflight.join(config)
    log.setup(False)
    os.seteuid(user)
    checks, facts = preflight.examine(config, None, Limits(scorer_s=0.5), device, words)
    assert len(facts) == dist.get_world_size()
    checks.append(preflight.try_update(config, checks, device, words, facts))
    return {check.name: (check.status, check.ranks, check.detail) for check in checks}


def _twice(rank: int, folder: str, alive: str, dead: str) -> list[Any]:
    """Two examinations: of sound ranks, and with rank 1 at fault in every way that can be faked."""
    torch.set_num_threads(1)
    reward = {"weights": dict.fromkeys(TRAINED, 1.0)}
    sound = tiny_config(Path(folder), f"reward.service.urls=[{alive}]", "parallel.branch=2",
                        reward=reward)  # fmt: skip
    found = [_examined(sound)]
    ill = tiny_config(Path(folder), f"reward.service.urls=[{alive}]", "parallel.branch=2",
                      f"folder={folder}/private", reward=reward)  # fmt: skip
    if rank == 0:
        Path(folder, "private").mkdir(mode=0o700)
    dist.barrier()
    clock = time.time
    if rank == 1:
        ill = tiny_config(Path(folder), f"reward.service.urls=[{dead}]", "parallel.branch=2",
                          f"folder={folder}/private", "seed=4", reward=reward)  # fmt: skip
        os.environ["MEGATRON_KVPO_COMMIT"] = "another"
        time.time = lambda: clock() + 9
    try:
        found.append(_examined(ill, user=NOBODY if rank == 1 else 0))
    finally:
        os.seteuid(0)
        time.time = clock
    return found


@pytest.mark.gloo
@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can make a folder that one rank may not use"
)
def test_two_sound_ranks_pass_and_each_fault_of_one_is_found(tmp_path):
    with serving(Noting(components=tuple(TRAINED))) as alive, free_port() as port:
        dead = f"http://127.0.0.1:{port}"
        results = on_ranks(2, _twice, str(tmp_path), alive, dead, folder=tmp_path)
    assert results[0] == results[1], "all ranks know all"
    sound, ill = results[0]
    assert {name for name, (status, *_) in sound.items() if status == "left out"} == {
        "gpu", "gpu health", "driver", "peer to peer",
    }  # fmt: skip
    assert [name for name, (status, *_) in sound.items() if status == "FAIL"] == []
    assert "its alarms on" in sound["one update"][2]
    failed = {name: ranks for name, (status, ranks, _) in ill.items() if status == "FAIL"}
    assert failed == {
        "versions": [1], "settings": [1], "checkpoint folder": [1], "clock": [1], "scorers": [1],
    }  # fmt: skip
    for name, words in (
        ("versions", "commit is another, elsewhere "), ("checkpoint folder", "PermissionError"),
        ("clock", "+9.0"), ("scorers", f"scorer {dead} has not answered within 0.5 s"),
    ):  # fmt: skip
        assert words in ill[name][2], ill[name]
    assert ill["one update"] == (
        "left out", [], "['versions', 'settings'] failed: see to that first",
    )  # fmt: skip
    assert not list(tmp_path.rglob(".preflight-*"))


def test_the_command_writes_what_it_found_and_ends_with_1_if_something_failed(tmp_path):
    recipe = write_recipe(tmp_path, reward={"weights": dict.fromkeys(TRAINED, 1.0)})
    command = [sys.executable, "-m", "tools.preflight", str(recipe), "folder=/proc/none",
               "--output", str(tmp_path / "found.json"), "--disk-gib", "1e9"]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 1, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said == {"ok": False, "failed": {"disk": [0], "checkpoint folder": [0]}, "ranks": 1}
    record = json.loads((tmp_path / "found.json").read_text())
    status = {check["name"]: check["status"] for check in record["checks"]}
    assert (status["all-reduce"], status["one update"]) == ("left out", "ok")
    assert record["ranks"][0]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "FAIL      checkpoint folder" in done.stderr


def test_ranks_that_the_layout_does_not_divide_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 ranks cannot be split"):
        preflight.join(load_config(ROOT / "examples/wan/longlive_14b.yaml", ["device=cpu"]))


def _on_gpus(count: int, tmp_path: Path, *options: str) -> tuple[int, dict[str, str], str]:
    """Exit code, status of each check and stderr of a preflight of the demo on so many GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr",
               "127.0.0.1", "--nproc_per_node", str(count), "-m", "tools.preflight",
               "examples/shapes/demo.yaml", "device=cuda", f"folder={tmp_path}", *options,
               "--output", str(tmp_path / "found.json"), "--disk-gib", "1"]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400
    )
    record = json.loads((tmp_path / "found.json").read_text())
    return done.returncode, {c["name"]: c["status"] for c in record["checks"]}, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_gpu_is_looked_at_and_updates(tmp_path):
    code, status, stderr = _on_gpus(1, tmp_path)
    assert code == 0, stderr[-4000:]
    assert (status["gpu"], status["one update"], status["all-reduce"]) == ("ok", "ok", "left out")
    assert status["gpu health"] in ("ok", "left out")


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_are_measured_against_a_topology_and_a_wrong_one_is_found_out(tmp_path):
    two = tmp_path / "two.yaml"
    two.write_text("gpus_per_node: 2\nnvlink_gb_s: 450\nparallel: {branch: 2}\n")
    code, status, stderr = _on_gpus(2, tmp_path, "--topology", str(two))
    assert code == 0, stderr[-4000:]
    assert [status[name] for name in ("gpu", "all-reduce", "pair", "one update")] == ["ok"] * 4
    two.write_text("gpus_per_node: 2\nnvlink_gb_s: 1e6\ngpu: Z80\n")
    code, status, stderr = _on_gpus(2, tmp_path, "--topology", str(two))
    assert code == 1
    assert (status["gpu"], status["all-reduce"]) == ("FAIL", "FAIL")
    assert "the topology says Z80" in stderr
