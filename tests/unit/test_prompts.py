"""The prompt file and the prompts of each update."""

import pytest

from megatron_kvpo.config import StreamConfig
from megatron_kvpo.data.prompts import PromptStream, check_prompts, load_prompts, share
from megatron_kvpo.records import Prompt

STREAM = StreamConfig(num_frames=21)


def some(number: int) -> list[Prompt]:
    return [Prompt(segments=("a square",), index=i) for i in range(number)]


def test_prompts_bear_their_segments_switches_and_place(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"segments": ["a", "b"], "switch_frames": [9]}\n\n{"segments": ["c"], "file": "x.webm"}\n'
    )
    assert load_prompts(file) == [
        Prompt(segments=("a", "b"), switch_frames=(9,), index=0),
        Prompt(segments=("c",), index=2),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds 0 prompts: write one JSON object a line"),
        ("\n \n", "holds 0 prompts"),
        ('{"segments": ["a"]}\n{"segments": ["a"', "line 2 is not JSON"),
        ('{"text": "a"}', "line 1 has no key 'segments'"),
        ('["a"]', "line 1 has no key 'segments'"),
        ('{"segments": "a"}', "line 1: 'segments' is 'a', not a list of texts"),
        ('{"segments": ["a", "b"], "switch_frames": [1.5]}', "not a list of latent frames"),
        ('{"segments": ["a", "b"]}', "line 1: prompt 0 has 2 segments and 0 switch frames"),
        ('{"segments": ["a", " "], "switch_frames": [3]}', "line 1: prompt 0 has an empty segment"),
    ],
)
def test_bad_lines_are_named_with_file_line_and_remedy(tmp_path, text, message):
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no prompt file at .*gone"):
        load_prompts(tmp_path / "gone")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (10, "frame 10, inside a block of 3: use 9 or 12"),
        (21, r"frame 21: it must lie in \[3, 18\]"),
        (0, None),
    ],
)
def test_switches_must_fall_between_blocks_and_inside_the_video(frame, message):
    if message is None:
        with pytest.raises(ValueError, match="must rise"):
            Prompt(segments=("a", "b"), switch_frames=(frame,))
        return
    with pytest.raises(ValueError, match=message):
        check_prompts([Prompt(segments=("a", "b"), switch_frames=(frame,))], STREAM)


def test_good_switches_pass():
    check_prompts([Prompt(segments=("a", "b", "c"), switch_frames=(3, 18))], STREAM)


def test_an_epoch_uses_each_prompt_once_and_the_next_in_another_order():
    stream = PromptStream(some(12), seed=1, groups_per_update=3)
    epochs = [
        [p.index for u in range(4 * e, 4 * e + 4) for p in stream.groups_of(u)] for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]


def test_prompts_of_an_update_depend_on_seed_and_update_only():
    forward, backward = (PromptStream(some(10), seed=1, groups_per_update=3) for _ in range(2))
    ahead = {u: forward.groups_of(u) for u in range(9)}
    assert ahead == {u: backward.groups_of(u) for u in reversed(range(9))}
    other = PromptStream(some(10), seed=2, groups_per_update=3)
    assert ahead != {u: other.groups_of(u) for u in range(9)}


def test_no_update_holds_a_prompt_twice():
    stream = PromptStream(some(10), seed=3, groups_per_update=4)
    assert all(len({p.index for p in stream.groups_of(u)}) == 4 for u in range(20))


def test_more_groups_than_prompts_are_refused():
    with pytest.raises(ValueError, match=r"groups_per_update 4 must lie in \[1, 3\]"):
        PromptStream(some(3), seed=0, groups_per_update=4)


def test_shares_of_the_data_ranks_are_the_whole_in_order():
    groups = some(8)
    assert share(groups, 0, 1) == groups
    assert [p for rank in range(4) for p in share(groups, rank, 4)] == groups
    with pytest.raises(ValueError, match=r"8 does not divide over 3 data ranks: use a multiple"):
        share(groups, 0, 3)
