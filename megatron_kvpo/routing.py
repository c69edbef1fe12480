"""Causal History Routing: where branches fork, and which old frames each of them attends to.

Plans come from coordinates (run seed, update, prompt), never from a rank or a global generator.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence

from megatron_kvpo.method_config import RoutingConfig, StreamConfig
from megatron_kvpo.records import RoutingPlan

MAX_LISTED = 512
"""Pools with at most this many possible routes are listed in full, so the draw is exact there."""

NUM_DRAWS = 128
"""Candidate routes drawn per branch from larger pools."""


def num_routed_frames(stream: StreamConfig, routing: RoutingConfig) -> int:
    """Old frames a branch draws: window - sink - recent - block, so that it sees a full window.

    Raises:
        ValueError: the recent frames or the margin are negative, or nothing is left to draw.
    """
    recent, margin = routing.num_recent_frames, routing.pool_margin_frames
    if recent < 0 or margin < 0:
        raise ValueError(
            f"routing.num_recent_frames {recent} and routing.pool_margin_frames {margin} must not "
            "be negative"
        )
    past = stream.window_frames - stream.sink_frames - stream.block_frames
    if recent >= past:
        raise ValueError(
            f"routing.num_recent_frames {recent} leaves nothing to route: a window of "
            f"{stream.window_frames} frames holds {past} past frames besides the sink; use at most "
            f"{past - 1}"
        )
    return past - recent


def pool(fork: int, stream: StreamConfig, routing: RoutingConfig) -> range:
    """Frames a branch that forks at `fork` may draw; empty if there are none.

    [max(sink, f + block (P - 1) - (resident - sink)), f - recent - margin): older than the recent
    frames, not in the sink, and still cached when the last routed block is generated.
    """
    last_block = fork + stream.block_frames * (routing.num_routed_blocks - 1)
    oldest = last_block - (stream.resident_frames - stream.sink_frames)
    stop = fork - routing.num_recent_frames - routing.pool_margin_frames
    return range(max(stream.sink_frames, oldest), stop)


def legal_forks(stream: StreamConfig, routing: RoutingConfig, given: int = 0) -> list[int]:
    """Latent frames at which a group may fork, ascending.

    A fork lies at or after the `given` frames that a prompt's video brings, starts a block, has a
    full window behind it, keeps its P blocks inside its chunk (one of the first `fork_chunks`) and,
    for `chr`, has a pool that offers every branch a route of its own.

    Raises:
        ValueError: no frame qualifies, with the numbers and what to change.
    """
    forks = range(stream.block_frames, stream.num_frames, stream.block_frames)
    fitting = [f for f in forks if _blocks_fit(f, stream, routing)]
    if routing.exploration != "chr":
        legal, largest = fitting, 0
    else:
        drawn = num_routed_frames(stream, routing)
        sizes = {f: len(pool(f, stream, routing)) for f in fitting}
        legal = [f for f, size in sizes.items() if math.comb(size, drawn) >= routing.num_branches]
        largest = max(sizes.values(), default=0)
    if not legal:
        raise ValueError(_no_fork(stream, routing, fitting, largest))
    if given > legal[-1]:
        raise ValueError(
            f"no legal fork: the first {given} latent frames come from a video, the last frame at "
            f"which a group may fork is {legal[-1]}. Lower 'video_frames' of the prompt to "
            f"{legal[-1]} or less, or raise stream.num_frames or routing.fork_chunks"
        )
    return [fork for fork in legal if fork >= given]


def _blocks_fit(fork: int, stream: StreamConfig, routing: RoutingConfig) -> bool:
    if fork < stream.window_frames:
        return False
    start, stop = stream.chunk_of(fork)
    index = 0 if start == 0 else 1 + (start - stream.first_chunk_frames) // stream.chunk_frames
    window_stop = fork + routing.num_routed_blocks * stream.block_frames
    return window_stop <= stop and index < routing.fork_chunks


def _no_fork(stream: StreamConfig, routing: RoutingConfig, fitting: list[int], largest: int) -> str:
    need = routing.num_routed_blocks * stream.block_frames
    if not fitting:
        return (
            f"no legal fork: {routing.num_routed_blocks} routed blocks take {need} frames inside "
            f"one chunk ({stream.first_chunk_frames}, then {stream.chunk_frames} frames), from "
            f"frame {stream.window_frames} on, in the first {routing.fork_chunks} chunks of "
            f"{stream.num_frames} frames. Lower routing.num_routed_blocks, or raise "
            "routing.fork_chunks, stream.num_frames or the chunk"
        )
    return (
        f"no legal fork: a branch draws {num_routed_frames(stream, routing)} frames and "
        f"{routing.num_branches} branches must differ, but the largest pool of the "
        f"{len(fitting)} candidate forks holds {largest} frames. Raise stream.resident_frames "
        f"({stream.resident_frames}) or stream.num_frames, or lower routing.num_branches, "
        "routing.num_routed_blocks or routing.pool_margin_frames"
    )


def draw_plan(
    stream: StreamConfig, routing: RoutingConfig, coordinates: tuple[int, ...], given: int = 0
) -> RoutingPlan:
    """Draw a group's fork, uniformly, and a route per branch.

    With `forks: per_update` the place of the fork among the legal ones is drawn of (run seed,
    update) alone: prompts with the same legal forks have the same one.

    Routes are pairwise distinct. Each takes the frames that the earlier ones used least, which
    maximises the mean distance between branches, and among those the route whose largest overlap
    with one branch is smallest. The plain window itself is drawn last: it repeats the anchor.

    Args:
        stream: Sizes of the video, its chunks and the cache.
        routing: Group size, policy window and pool.
        coordinates: (run seed, update, prompt index); the same ones give the same plan anywhere.
        given: Latent frames that the prompt's video brings: the fork lies at or after them.

    Raises:
        ValueError: no fork is legal.
    """
    rng = random.Random(f"routing plan {tuple(coordinates)}")
    legal = legal_forks(stream, routing, given)
    fork = rng.choice(legal)
    if routing.forks == "per_update":
        place = random.Random(f"fork {tuple(coordinates[:2])}").random()
        fork = legal[int(place * len(legal))]
    routes: tuple[tuple[int, ...], ...] = ((),) * routing.num_branches
    if routing.exploration == "chr":
        drawn = num_routed_frames(stream, routing)
        newest = fork - routing.num_recent_frames
        plain = tuple(range(newest - drawn, newest))
        frames = pool(fork, stream, routing)
        routes = _spread_routes(frames, drawn, routing.num_branches, plain, rng)
    return RoutingPlan(
        fork_frame=fork, num_blocks=routing.num_routed_blocks, routed_frames_G=routes
    )


def _spread_routes(
    frames: range, drawn: int, count: int, plain: tuple[int, ...], rng: random.Random
) -> tuple[tuple[int, ...], ...]:
    """`count` distinct ascending routes of `drawn` frames each; C(len(frames), drawn) >= count."""
    uses = dict.fromkeys(frames, 0)
    chosen: list[tuple[int, ...]] = []

    def rank(route: tuple[int, ...]) -> tuple[bool, int, int]:
        shared = max((len(set(route) & set(other)) for other in chosen), default=0)
        return route == plain, sum(uses[f] for f in route), shared

    for _ in range(count):
        route = min(_candidates(uses, drawn, chosen, rng), key=rank)
        chosen.append(route)
        for frame in route:
            uses[frame] += 1
    return tuple(chosen)


def _candidates(
    uses: dict[int, int], drawn: int, chosen: list[tuple[int, ...]], rng: random.Random
) -> list[tuple[int, ...]]:
    """Routes still free, in random order: all of a small pool, else draws of the least used."""
    taken = set(chosen)
    if math.comb(len(uses), drawn) <= MAX_LISTED:
        free = [r for r in itertools.combinations(uses, drawn) if r not in taken]
        rng.shuffle(free)
        return free
    free = []
    for draw in itertools.count():
        frames = rng.sample(list(uses), len(uses))
        if draw < NUM_DRAWS:
            frames.sort(key=uses.__getitem__)
        route = tuple(sorted(frames[:drawn]))
        if route not in taken:
            free.append(route)
        if free and draw + 1 >= NUM_DRAWS:
            break
    return free


def plain_context(frame: int, stream: StreamConfig) -> list[int]:
    """Past frames the block at `frame` sees without routing, ascending, each once.

    The sink and the last window - sink - block frames before it; all of them while fewer exist. The
    block's own frames are not listed.
    """
    past = stream.window_frames - stream.sink_frames - stream.block_frames
    sink = range(min(stream.sink_frames, frame))
    return sorted({*sink, *range(max(0, frame - past), frame)})


def routed_context(
    frame: int, routed: Sequence[int], stream: StreamConfig, routing: RoutingConfig
) -> list[int]:
    """Past frames the block at `frame` sees under routing: sink, routed and recent, ascending.

    Recent frames are [frame - recent, frame), relative to this block. With `routed` naming the
    older frames of the plain window this is `plain_context`. The block's own frames are not listed.

    Raises:
        ValueError: a routed frame lies in the sink or among the recent frames, or occurs twice.
    """
    recent = range(frame - routing.num_recent_frames, frame)
    wrong = [f for f in routed if not stream.sink_frames <= f < recent.start]
    if wrong or len(set(routed)) != len(routed):
        raise ValueError(
            f"routed frames {list(routed)} of the block at {frame} must be distinct and lie in "
            f"[{stream.sink_frames}, {recent.start}), between the sink and the recent frames"
        )
    return sorted({*range(stream.sink_frames), *routed, *recent})


def context_frames(
    frame: int, plan: RoutingPlan, sequence: int, stream: StreamConfig, routing: RoutingConfig
) -> list[int]:
    """Past frames that the block at `frame` of sequence `sequence` sees when it is generated.

    Routed for a branch inside the plan's policy window; plain for the anchor (sequence G), outside
    the window and where the plan routes nothing.

    Raises:
        ValueError: the plan has no such sequence.
    """
    count = len(plan.routed_frames_G)
    if not 0 <= sequence <= count:
        raise ValueError(
            f"sequence {sequence} of {count} branches: use 0..{count}, the anchor last"
        )
    stop = plan.fork_frame + plan.num_blocks * stream.block_frames
    routed = plan.routed_frames_G[sequence] if sequence < count else ()
    if not routed or not plan.fork_frame <= frame < stop:
        return plain_context(frame, stream)
    return routed_context(frame, routed, stream, routing)


def route_entropy(plan: RoutingPlan) -> float:
    """Entropy, in nats, of an old frame drawn from a branch drawn from the group.

    From log(routed frames), where all branches see the same, to log(pool); 0 without routing.
    """
    seen = Counter(frame for routed in plan.routed_frames_G for frame in routed)
    total = sum(seen.values())
    return -sum(n / total * math.log(n / total) for n in seen.values())


def diversity(plan: RoutingPlan) -> float:
    """Mean over pairs of branches of the frames that one routes and the other does not.

    Half the Hamming distance of their membership vectors: from 0 (all alike, or no routing) to the
    number of routed frames (nothing shared).
    """
    pairs = list(itertools.combinations(plan.routed_frames_G, 2))
    return sum(len(set(a) - set(b)) for a, b in pairs) / max(1, len(pairs))
