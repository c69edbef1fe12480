"""What scores in tools/serve_rewards.py: requests that wait together are scored together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kvpo import log
from megatron_kvpo.records import Clip
from megatron_kvpo.reward.base import Reward

logger = log.get_logger("megatron_kvpo.tools.serve_rewards")


class ScoreError(RuntimeError):
    """A reward failed, or scored what is no number. The text may be sent to who asked."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What a request gets."""

    score_KB: Tensor
    seconds: float
    """That its batch was scored in."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    """One request."""

    clips: Sequence[Clip]
    components: tuple[str, ...]
    answer: asyncio.Future[Scored]


class Worker:
    """Owns the rewards: one thread calls them, one batch of requests after another."""

    def __init__(
        self, rewards: Sequence[Reward], components: Sequence[str], max_clips: int, wait_s: float
    ) -> None:
        """`components` are offered, `max_clips` scored at once; a batch is awaited `wait_s`."""
        self.components = tuple(components)
        self.scored, self.seconds = 0, 0.0
        self._rewards = list(rewards)
        self._max_clips, self._wait_s = max_clips, wait_s
        self._waiting: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Work as long as the context lasts."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            self._thread.shutdown(wait=False)

    async def score(self, clips: Sequence[Clip], components: Sequence[str]) -> Scored:
        """Scores, float32 [K, B] on the CPU, a row for each of `components`.

        Raises:
            ValueError: a reward refuses one of these clips.
            ScoreError: a reward fails, or a score is not finite.
        """
        answer: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Job(clips=clips, components=tuple(components), answer=answer))
        self._arrived.set()
        return await answer  # cancelled with who waits for it

    async def _run(self) -> None:
        while True:
            await self._serve(await self._gather())

    async def _gather(self) -> list[_Job]:
        """What waits, in order, up to max_clips; a request alone may have more."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        await asyncio.sleep(self._wait_s)
        batch: list[_Job] = []
        room = self._max_clips
        while self._waiting and (not batch or len(self._waiting[0].clips) <= room):
            job = self._waiting.popleft()
            if not job.answer.done():
                batch.append(job)
                room -= len(job.clips)
        return batch

    async def _serve(self, batch: list[_Job]) -> None:
        """Score a batch and answer each request. A batch that fails is tried one by one."""
        if not batch:
            return
        loop = asyncio.get_running_loop()
        scoring = loop.run_in_executor(self._thread, self._score, batch)
        (found,) = await asyncio.gather(scoring, return_exceptions=True)
        del scoring
        if isinstance(found, list):
            for job, scored in zip(batch, found, strict=True):
                if not job.answer.done():
                    _settle(job, scored)
        elif len(batch) > 1:
            logger.info("a batch of %d requests failed (%s): they are tried one by one",
                        len(batch), type(found).__name__)  # fmt: skip
            del found  # its traceback holds what was computed on
            for job in batch:
                await self._serve([] if job.answer.done() else [job])
        elif not batch[0].answer.done():
            batch[0].answer.set_exception(_fault(batch[0], found))

    @torch.no_grad()
    def _score(self, batch: list[_Job]) -> list[Scored]:
        """Scores of each request; each reward is called once, or not if nobody asks it."""
        started = time.monotonic()
        rows: list[dict[str, Tensor]] = [{} for _ in batch]
        for reward in self._rewards:
            asked = [i for i, job in enumerate(batch) if set(job.components) & {*reward.components}]
            clips = [clip for i in asked for clip in batch[i].clips]
            if not clips:
                continue
            score_KB = self._asked(reward, clips)
            parts = torch.split(score_KB, [len(batch[i].clips) for i in asked], dim=1)
            for i, part in zip(asked, parts, strict=True):
                rows[i].update(zip(reward.components, part, strict=True))
        seconds = time.monotonic() - started
        self.seconds += seconds
        self.scored += sum(len(job.clips) for job in batch)
        return [
            Scored(torch.stack([row[name] for name in job.components]), seconds)
            for job, row in zip(batch, rows, strict=True)
        ]

    @staticmethod
    def _asked(reward: Reward, clips: Sequence[Clip]) -> Tensor:
        try:
            score_KB = reward.score(clips).float().cpu()
        except StopIteration as error:  # no future can carry it
            raise RuntimeError("a reward let StopIteration out") from error
        if score_KB.shape != (len(reward.components), len(clips)):
            raise ScoreError(f"{list(reward.components)} scored {list(score_KB.shape)} for "
                             f"{len(clips)} clips")  # fmt: skip
        return score_KB


def _settle(job: _Job, scored: Scored) -> None:
    score_KB = scored.score_KB
    bad = (~score_KB.isfinite()).nonzero()
    if not len(bad):
        job.answer.set_result(scored)
        return
    k, b = bad[0].tolist()
    job.answer.set_exception(ScoreError(
        f"{job.components[k]} is {score_KB[k, b]:g} for clip {b} of {len(job.clips)}: "
        f"{len(bad)} of {score_KB.numel()} scores are not finite"
    ))  # fmt: skip


def _fault(job: _Job, error: BaseException) -> ValueError | ScoreError:
    """What is told to who asked; the log has the rest."""
    if isinstance(error, ValueError | ScoreError):
        return error
    logger.error("scoring %d clips by %s failed", len(job.clips), list(job.components),
                 exc_info=error)  # fmt: skip
    return ScoreError(f"scoring by {list(job.components)} failed with {type(error).__name__}; "
                      "the server's log says where")  # fmt: skip
