"""How many pages a run needs at once, from its prompts' switches and the forks that it may draw.

A page at 1.3B and 480 x 832 is 287 MB in bfloat16: what is not needed must not be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_kvpo.config import PolicyConfig
from megatron_kvpo.method_config import MemoryConfig, RoutingConfig, StreamConfig
from megatron_kvpo.records import Prompt
from megatron_kvpo.routing import legal_forks


def video_pages(stream: StreamConfig, memory: MemoryConfig, prompts: Iterable[Prompt]) -> int:
    """Most pages of one row that streams any of these prompts and keeps the window only."""
    window = [(stream.num_frames, stream.window_frames)]
    peaks = (_peak(0, window, prompt.switch_frames, stream) for prompt in prompts)
    return max(peaks, default=0) + _bank_pages(memory)


def branch_pages(stream: StreamConfig, routing: RoutingConfig, prompts: Iterable[Prompt]) -> int:
    """Most pages of its own that a branch of any of these prompts has, in rollout or replay.

    It shares its prefix's. While it is routed it keeps the resident frames, then the window.
    """
    most = 0
    for switches, given in {(prompt.switch_frames, prompt.video_frames) for prompt in prompts}:
        for fork in legal_forks(stream, routing, given):
            routed = fork + routing.num_routed_blocks * stream.block_frames
            parts = [(routed, stream.resident_frames), (stream.num_frames, stream.window_frames)]
            most = max(most, _peak(fork, parts, switches, stream))
    return most


def replay_pages(
    stream: StreamConfig, routing: RoutingConfig, memory: MemoryConfig, prompt: Prompt, rows: int
) -> int:
    """Most pages that a replay of some branches takes beyond their prefix's."""
    return rows * (branch_pages(stream, routing, [prompt]) + _bank_pages(memory))


def run_pages(
    stream: StreamConfig, routing: RoutingConfig, memory: MemoryConfig, prompts: Sequence[Prompt],
    held_out: Sequence[Prompt], *, groups: int, sequences: int, videos: int,
) -> int:  # fmt: skip
    """Pages of this rank's pool: enough for every update and every evaluation.

    Args:
        stream: sizes of video, window and cache.
        routing: the policy window.
        memory: MemFlow's bank.
        prompts: of training.
        held_out: of the evaluation.
        groups: prompts whose prefixes are held at once.
        sequences: branches and anchor of a group on this rank.
        videos: rows of one evaluation pass.
    """
    bank = _bank_pages(memory)
    prefix = min(stream.resident_frames, legal_forks(stream, routing)[-1]) + bank
    rows = sequences * (branch_pages(stream, routing, prompts) + bank)
    update = groups * prefix + max(stream.block_frames, rows)
    return max(update, videos * video_pages(stream, memory, held_out))


def rows_at_once(sequences: int, policy: PolicyConfig, num_branches: int) -> int:
    """Rows whose pages a rank with so many sequences of a group holds at once: see run_pages."""
    turn = min(sequences, policy.rollout_rows or sequences)
    return max(turn, min(policy.max_rows, num_branches))


def _bank_pages(memory: MemoryConfig) -> int:
    """A row's slots, the slots to come while it chooses, and the staged frame."""
    return 2 * memory.bank_frames + 1 if memory.bank_frames else 0


def _peak(
    fork: int, parts: Sequence[tuple[int, int]], switches: Sequence[int], stream: StreamConfig
) -> int:
    """Most pages of a row that shares all frames before `fork`.

    `parts` say up to which frame how many frames stay in the cache.
    """
    own: set[int] = set()
    most, frame = 0, fork
    for stop, resident in parts:
        own = _kept(own, frame, resident, stream)
        while frame < stop:
            if frame in switches and frame > fork:
                own |= set(range(max(stream.sink_frames, frame - stream.window_frames), frame))
                most = max(most, len(own))
                own = _kept(own, frame, resident, stream)
            own |= set(range(frame, frame + stream.block_frames))
            most = max(most, len(own))
            frame += stream.block_frames
            own = _kept(own, frame, resident, stream)
    return most


def _kept(own: set[int], frame: int, resident: int, stream: StreamConfig) -> set[int]:
    oldest = frame - (resident - stream.sink_frames)
    return {f for f in own if f < stream.sink_frames or f >= oldest}
