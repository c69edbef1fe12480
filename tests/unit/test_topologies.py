"""Topologies: who talks to whom, on which wires; and files that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_kvpo.config import ModelConfig, ParallelConfig
from megatron_kvpo.method_config import BACKBONES
from megatron_kvpo.model.specs import check_layout
from megatron_kvpo.parallel import groups
from megatron_kvpo.settings import from_mapping
from tools import topology

GOOD = {
    "nodes": 2, "gpus_per_node": 4,
    "parallel": {"tensor": 2, "context": 1, "branch": 2, "sequence_parallel": True},
}  # fmt: skip


def test_one_eight_sixteen_and_thirty_two_gpus_are_there_for_both_models():
    found = {name: topology.load(name) for name in topology.names()}
    assert {(t.world, t.model) for t in found.values()} == {
        (world, model) for world in (1, 8, 16, 32) for model in BACKBONES
    }
    for t in found.values():
        assert (t.gpu, t.gpu_memory_gib) == ("H200", 139)
        assert (t.ib_gb_s > 0) == (t.nodes > 1)
        assert (t.nvlink_gb_s > 0) == (t.gpus_per_node > 1)


@pytest.mark.parametrize("name", topology.names())
def test_the_layout_is_one_that_the_model_and_the_ranks_take(name):
    t = topology.load(name)
    values = [text.removeprefix("parallel.").split("=") for text in t.overrides()]
    config = ParallelConfig(**{key: yaml.safe_load(value) for key, value in values})
    assert groups.check_sizes(t.world, config) == t.sizes[3]
    check_layout(from_mapping(ModelConfig, {"preset": t.model}), config)


@pytest.mark.parametrize("name", topology.names())
def test_every_rank_is_in_the_groups_that_the_run_will_make(name):
    """As parallel/groups.py makes them: by Megatron for tensor, context, replicas, else its own."""
    from megatron.core.parallel_state import RankGenerator

    t = topology.load(name)
    tensor, context, branch, data = t.sizes
    made = RankGenerator(
        tp=tensor, ep=1, dp=branch * data, pp=1, cp=context, order="tp-cp-ep-dp-pp"
    )
    found = t.groups()
    assert sorted(found["tensor"]) == sorted(made.get_ranks("tp"))
    assert sorted(found["context"]) == sorted(made.get_ranks("cp"))
    assert sorted(found["branch"]) == sorted(groups._rows(t.sizes, 2))
    assert sorted(found["data"]) == sorted(groups._rows(t.sizes, 3))
    for members in found.values():
        assert sorted(rank for group in members for rank in group) == list(range(t.world))


@pytest.mark.parametrize("name", topology.names())
def test_what_talks_in_every_layer_stays_on_nvlink_and_so_do_branches_that_fit(name):
    t = topology.load(name)
    found = t.groups()
    fits = t.sizes[0] * t.sizes[1] * t.sizes[2] <= t.gpus_per_node
    for axis in ("tensor", "context", *(["branch"] if fits else [])):
        for group in found[axis]:
            assert len(t.nodes_of(group)) == 1, (axis, group)
    assert fits, "the layouts that are there keep a group of branches on one node"
    if t.nodes > 1:
        assert all(len(t.nodes_of(group)) == t.nodes for group in found["data"])


def test_branches_that_do_not_fit_a_node_cross_it_and_are_said_to():
    t = from_mapping(topology.Topology, {"nodes": 2, "gpus_per_node": 2, "parallel": {"branch": 4}})
    assert [t.nodes_of(group) for group in t.groups()["branch"]] == [[0, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 0}, "nodes is 0: it must be above 0"),
        ({"gpus_per_node": -1}, "gpus_per_node is -1"),
        ({"ib_gb_s": -2}, r"ib_gb_s is -2: give 0 \(not known\) or more"),
        ({"parallel": {"tensor": 8}}, "tensor x context = 8 does not divide the 4 GPUs"),
        ({"parallel": {"branch": 3}}, "8 ranks do not divide by tensor x context x branch = 3"),
        ({"nodes": 3, "parallel": {"branch": 3}}, "some branch groups would cross nodes"),
        ({"parallel": {"context": 0}}, "parallel.context is 0"),
        ({"parallel": {"sequence_parallel": True}}, "set parallel.tensor above 1"),
        ({"parallel": {"data": 2}}, "unknown setting parallel.data"),
        ({"order": ["data", "tensor", "context", "branch"]}, "and no other way"),
        ({"environment": {"PATH": "/"}}, r"environment sets \['PATH'\]"),
        ({"environment": {"NCCL_DEBUG": 1}}, "environment.NCCL_DEBUG is 1: it takes a text"),
        ({"gpu_per_node": 4}, "did you mean gpus_per_node"),
    ],
)
def test_what_cannot_be_is_refused_with_the_file_and_the_number(tmp_path, change, message):
    file = tmp_path / "odd.yaml"
    file.write_text(yaml.safe_dump({**GOOD, **change}))
    with pytest.raises(ValueError, match=rf"odd\.yaml: .*{message}"):
        topology.load(str(file))


def test_a_name_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(ValueError, match=r"no topology 9xh200.*'32xh200_14b'"):
        topology.load("9xh200")
    for text, message in (("- 1", "not a list"), ("a: [", "is no YAML")):
        (tmp_path / "odd.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            topology.load(str(tmp_path / "odd.yaml"))


def test_the_ranks_that_were_started_must_be_the_topologys():
    t = from_mapping(topology.Topology, GOOD)
    topology.check_ranks(t, 8, 4, "x")
    for world, local in ((4, 4), (8, 8)):
        with pytest.raises(ValueError, match=f"= 8 ranks, this start has {world} with {local}"):
            topology.check_ranks(t, world, local, "x")


def test_the_module_says_which_nodes_each_group_lies_on(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["topology", "16xh200_14b"])
    assert topology.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tensor\tranks [14, 15]\tnodes [1]" in lines
    assert "data\tranks [0, 8]\tnodes [0, 1]" in lines
    assert Path(topology.FOLDER, "16xh200_14b.yaml").is_file()
