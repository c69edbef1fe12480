import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest

from megatron_kvpo.method_config import RoutingConfig, StreamConfig
from megatron_kvpo.records import RoutingPlan
from megatron_kvpo.routing import (
    context_frames,
    diversity,
    draw_plan,
    legal_forks,
    num_routed_frames,
    plain_context,
    pool,
    routed_context,
)

LONG, CHR = StreamConfig(), RoutingConfig()
SHORT = StreamConfig(num_frames=21)
ONE_BLOCK = RoutingConfig(num_routed_blocks=1)


def test_longlive_recipe_has_twelve_forks_with_pools_of_seventeen():
    assert legal_forks(LONG, CHR) == [21, 24, 39, 42, 57, 60, 75, 78, 93, 96, 111, 114]
    assert {len(pool(f, LONG, CHR)) for f in legal_forks(LONG, CHR)} == {17}
    # at 24 the last of 5 blocks starts at 36 and keeps 30 frames: [6, 23)
    assert pool(24, LONG, CHR) == range(6, 23)
    assert pool(21, LONG, CHR) == range(3, 20)
    assert num_routed_frames(LONG, CHR) == 12 - 3 - 1 - 3


def test_reference_margin_leaves_pools_of_fourteen():
    margin = replace(CHR, pool_margin_frames=3)
    assert {len(pool(f, LONG, margin)) for f in legal_forks(LONG, margin)} == {14}


@pytest.mark.parametrize("resident", [21, 33])
def test_short_video_of_one_chunk_forks_where_a_window_lies_behind(resident: int):
    stream = replace(SHORT, resident_frames=resident)
    assert legal_forks(stream, ONE_BLOCK) == [12, 15, 18]
    assert pool(12, stream, ONE_BLOCK) == range(3, 11)


def test_forks_without_routing_need_no_pool():
    tight = replace(SHORT, resident_frames=12, num_frames=15)
    few = replace(ONE_BLOCK, num_recent_frames=5, pool_margin_frames=6)  # pool [3, 1): nothing
    with pytest.raises(ValueError, match="holds 0 frames"):
        legal_forks(tight, few)
    for exploration in ("noise", "none"):
        routing = replace(few, exploration=exploration)
        assert legal_forks(tight, routing) == [12]
        assert draw_plan(tight, routing, (0, 0, 0)).routed_frames_G == ((),) * 8


def test_no_fork_says_the_numbers_and_the_remedy():
    with pytest.raises(ValueError, match=r"7 routed blocks take 21 frames.*routing\.num_routed"):
        legal_forks(LONG, replace(CHR, num_routed_blocks=7))
    with pytest.raises(ValueError, match=r"branch draws 5 frames and 57 branches.*holds \d+ fram"):
        # at 12, the only fork, the pool of 8 offers C(8, 5) = 56 routes
        legal_forks(replace(SHORT, num_frames=15), replace(ONE_BLOCK, num_branches=57))
    with pytest.raises(ValueError, match=r"leaves nothing to route.*at most 5"):
        legal_forks(SHORT, replace(ONE_BLOCK, num_recent_frames=6))
    with pytest.raises(ValueError, match="must not be negative"):
        legal_forks(SHORT, replace(ONE_BLOCK, num_recent_frames=-1))


def test_plans_come_from_their_coordinates_alone():
    plans = [draw_plan(LONG, CHR, (seed, 3, 1)) for seed in range(30)]
    assert plans == [draw_plan(LONG, CHR, (seed, 3, 1)) for seed in range(30)]
    assert len({p.routed_frames_G for p in plans}) == 30
    assert draw_plan(LONG, CHR, (0, 3, 1)) != draw_plan(LONG, CHR, (0, 3, 2))
    assert draw_plan(LONG, CHR, (0, 3, 1)) != draw_plan(LONG, CHR, (0, 4, 1))


def test_a_plan_is_pinned_across_versions():
    plan = draw_plan(SHORT, ONE_BLOCK, (42, 0, 0))
    assert plan.fork_frame == 12
    assert plan.routed_frames_G[:2] == ((3, 4, 6, 7, 8), (5, 6, 7, 9, 10))


def test_forks_are_drawn_about_evenly():
    draws = Counter(draw_plan(SHORT, ONE_BLOCK, (s, 0, 0)).fork_frame for s in range(300))
    # 100 expected each, standard deviation sqrt(300 * 1/3 * 2/3) = 8.2
    assert set(draws) == {12, 15, 18}
    assert all(abs(n - 100) < 33 for n in draws.values())


def test_one_fork_for_an_update_leaves_routes_to_each_prompt():
    shared = replace(CHR, forks="per_update")
    draws = Counter()
    for update in range(300):
        plans = [draw_plan(LONG, shared, (0, update, prompt)) for prompt in range(4)]
        assert len({plan.fork_frame for plan in plans}) == 1
        assert len({plan.routed_frames_G for plan in plans}) == 4
        draws[plans[0].fork_frame] += 1
    # 25 expected each, standard deviation 4.8
    assert sorted(draws) == legal_forks(LONG, CHR)
    assert all(abs(n - 25) < 20 for n in draws.values())
    assert draw_plan(LONG, shared, (0, 3, 1)) != draw_plan(LONG, shared, (1, 3, 1))


def test_one_fork_for_an_update_keeps_to_what_a_prompts_video_leaves():
    shared, given = replace(CHR, forks="per_update"), 60
    forks = {draw_plan(LONG, shared, (0, update, 0), given).fork_frame for update in range(200)}
    assert sorted(forks) == legal_forks(LONG, CHR, given)


@pytest.mark.parametrize(("stream", "routing"), [(LONG, CHR), (SHORT, ONE_BLOCK)])
def test_routes_are_distinct_sorted_in_the_pool_and_as_far_apart_as_can_be(
    stream: StreamConfig, routing: RoutingConfig
):
    for seed in range(10):
        plan = draw_plan(stream, routing, (seed, 0, 0))
        frames = pool(plan.fork_frame, stream, routing)
        routes = plan.routed_frames_G
        assert len(set(routes)) == 8
        assert all(list(r) == sorted(set(r)) and len(r) == 5 for r in routes)
        assert all(set(r) <= set(frames) for r in routes)
        uses = Counter(f for r in routes for f in r)
        counts = [uses[f] for f in frames]
        newest = plan.fork_frame - 1
        assert tuple(range(newest - 5, newest)) not in routes
        if stream is LONG:  # 40 draws over 17 frames, no frame more than one above another
            assert max(counts) - min(counts) <= 1
            shared = sum(math.comb(n, 2) for n in counts)
            assert diversity(plan) == pytest.approx(5 - shared / math.comb(8, 2))
            assert diversity(plan) > 3.7


def test_a_pool_barely_large_enough_is_used_up():
    # fork 12, recent 1: pool [3, 11) of 8 frames, C(8, 5) = 56 routes for 56 branches
    stream = replace(SHORT, num_frames=15)
    plan = draw_plan(stream, replace(ONE_BLOCK, num_branches=56), (0, 0, 0))
    assert set(plan.routed_frames_G) == set(itertools.combinations(range(3, 11), 5))
    # the window itself, which repeats the anchor, comes last
    assert plan.routed_frames_G[-1] == (6, 7, 8, 9, 10)


def test_plain_context_is_sink_and_the_newest_frames_each_once():
    assert plain_context(0, LONG) == []
    assert plain_context(3, LONG) == [0, 1, 2]
    assert plain_context(9, LONG) == list(range(9))
    assert plain_context(12, LONG) == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert plain_context(30, LONG) == [0, 1, 2, 24, 25, 26, 27, 28, 29]


def test_a_routed_block_sees_sink_route_and_the_recent_of_its_own():
    route = (4, 6, 8, 10, 12)
    assert routed_context(24, route, LONG, CHR) == [0, 1, 2, *route, 23]
    assert routed_context(27, route, LONG, CHR) == [0, 1, 2, *route, 26]
    assert len(routed_context(24, route, LONG, CHR)) + 3 == LONG.window_frames


@pytest.mark.parametrize("recent", [0, 1, 3, 4])
@pytest.mark.parametrize("frame", [12, 15, 42])
def test_routing_the_window_itself_is_the_plain_context(frame: int, recent: int):
    routing = replace(CHR, num_recent_frames=recent)
    older = range(frame - 6, frame - recent)
    assert len(older) == num_routed_frames(LONG, routing)
    assert routed_context(frame, older, LONG, routing) == plain_context(frame, LONG)


def test_a_route_into_sink_or_recent_frames_is_refused():
    for route in ((2, 5, 6, 7, 8), (5, 6, 7, 8, 23), (5, 5, 6, 7, 8)):
        with pytest.raises(ValueError, match=r"distinct and lie in \[3, 23\)"):
            routed_context(24, route, LONG, CHR)


def test_context_is_routed_for_branches_inside_the_window_only():
    plan = draw_plan(SHORT, ONE_BLOCK, (1, 0, 0))
    fork = plan.fork_frame
    anchor = len(plan.routed_frames_G)
    for branch, route in enumerate(plan.routed_frames_G):
        expected = routed_context(fork, route, SHORT, ONE_BLOCK)
        assert context_frames(fork, plan, branch, SHORT, ONE_BLOCK) == expected
        for frame in (fork - 3, fork + 3):
            seen = context_frames(frame, plan, branch, SHORT, ONE_BLOCK)
            assert seen == plain_context(frame, SHORT)
    seen = context_frames(fork, plan, anchor, SHORT, ONE_BLOCK)
    assert seen == plain_context(fork, SHORT)
    with pytest.raises(ValueError, match=r"use 0\.\.8"):
        context_frames(fork, plan, anchor + 1, SHORT, ONE_BLOCK)


def test_no_exploration_sees_the_plain_window():
    routing = replace(ONE_BLOCK, exploration="none")
    plan = draw_plan(SHORT, routing, (0, 0, 0))
    seen = context_frames(plan.fork_frame, plan, 0, SHORT, routing)
    assert seen == plain_context(plan.fork_frame, SHORT)
    assert diversity(plan) == 0


def test_diversity_by_hand():
    plan = RoutingPlan(fork_frame=12, num_blocks=1, routed_frames_G=((3, 4), (3, 5), (6, 7)))
    assert diversity(plan) == (1 + 2 + 2) / 3
