"""What an evaluation says: gains in the base's standard deviations, errors clustered by prompt.

Dimension key, here: K reward components, R evaluation prompts, M noises per prompt.
Videos of one prompt resemble each other, so R, not R x M, counts as the number of samples.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]

_SMALLEST_SD = 1e-6
"""A reward that varies less than this over the base's videos is measured against it instead."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EvaluationTable:
    """Scores of one evaluation, the same prompts and noises each time."""

    components: tuple[str, ...]
    """Every reward that was scored, the held-out ones too."""

    score_KRM: Scores
    """float32, higher is better."""

    composite_RM: Scores
    """What is optimised: the weighted mean of the trained components."""

    prompt_R: npt.NDArray[np.int64]
    """Index of each prompt in its file. Two tables are paired only if these agree."""

    def __post_init__(self) -> None:
        shape = (len(self.components), *self.composite_RM.shape)
        if self.composite_RM.ndim != 2 or self.score_KRM.shape != shape:
            raise ValueError(
                f"scores {self.score_KRM.shape} and composite {self.composite_RM.shape} do not "
                f"fit {len(self.components)} components over prompts and noises"
            )
        if self.prompt_R.size != len(self.composite_RM):
            raise ValueError(
                f"{self.prompt_R.size} prompt indices for {len(self.composite_RM)} prompts"
            )
        if self.prompt_R.size < 2:
            raise ValueError(
                f"an evaluation of {self.prompt_R.size} prompts has no standard error, which is "
                "clustered by prompt: give it at least 2 prompts"
            )
        bad = int((~np.isfinite(self.score_KRM)).sum() + (~np.isfinite(self.composite_RM)).sum())
        if bad:
            raise ValueError(f"{bad} scores of the evaluation are not finite: check the rewards")

    @classmethod
    def build(
        cls,
        scores: Mapping[str, npt.ArrayLike],
        weights: Mapping[str, float],
        prompt_R: Sequence[int] | None = None,
    ) -> EvaluationTable:
        """Table from [R, M] scores per component; components without a weight are held out.

        Raises ValueError if a weighted component was not scored or the shapes differ.
        """
        missing = sorted(set(weights) - set(scores))
        if missing or not scores:
            raise ValueError(f"rewards {missing} have a weight and no scores: score them too")
        parts = {name: np.asarray(value, dtype=np.float64) for name, value in scores.items()}
        shapes = {name: part.shape for name, part in parts.items()}
        if len(set(shapes.values())) != 1 or next(iter(parts.values())).ndim != 2:
            raise ValueError(f"scores must all be [prompts, noises], not {shapes}")
        score_KRM = np.stack(list(parts.values()))
        weight_K = np.array([weights.get(name, 0.0) for name in parts]) / sum(weights.values())
        indices = range(score_KRM.shape[1]) if prompt_R is None else prompt_R
        return cls(
            components=tuple(parts),
            score_KRM=score_KRM.astype(np.float32),
            composite_RM=np.einsum("k,krm->rm", weight_K, score_KRM).astype(np.float32),
            prompt_R=np.asarray(list(indices), dtype=np.int64),
        )

    def of(self, component: str | None) -> Scores:
        """[R, M] scores of one component; None is the composite. ValueError if unknown."""
        if component is None:
            return self.composite_RM
        if component not in self.components:
            raise ValueError(f"no reward {component!r} in the table: {list(self.components)}")
        scores: Scores = self.score_KRM[self.components.index(component)]
        return scores

    def save(self, path: Path) -> None:
        """Write as .npz. The parent folder must exist."""
        np.savez(path, components=np.array(self.components), score_KRM=self.score_KRM,
                 composite_RM=self.composite_RM, prompt_R=self.prompt_R)  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> EvaluationTable:
        """Read what `save` wrote. ValueError if the file is missing or something else."""
        if not path.is_file():
            raise ValueError(f"no evaluation table at {path}: has this run finished?")
        try:
            with np.load(path) as file:
                return cls(
                    components=tuple(str(name) for name in file["components"]),
                    score_KRM=file["score_KRM"],
                    composite_RM=file["composite_RM"],
                    prompt_R=file["prompt_R"],
                )
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not an evaluation table: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """How far one reward moved between two evaluations."""

    before: float
    """Mean over videos, in the reward's units."""

    after: float
    standard_deviation: float
    """Of the videos before, over prompts and noises."""

    gain_sd: float
    """(after - before) / standard_deviation."""

    standard_error: float
    """Of gain_sd, clustered by prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """Mean paired difference between two arms, in the base's standard deviations."""

    mean_sd: float
    standard_error: float
    z: float
    """mean_sd / standard_error; 0 where both are 0, infinite where only the error is."""

    num_prompts: int
    num_seeds: int


def paired_gain(
    before: EvaluationTable, after: EvaluationTable, component: str | None = None
) -> Gain:
    """Change of the mean over the base's standard deviation (n - 1), paired by prompt and noise.

    With d_r the mean over noises of (after - before) for prompt r, gain_sd = mean_r(d_r) / SD and
    its standard error = std_r(d_r) / sqrt(R) / SD. None is the composite. ValueError if the two
    do not pair.
    """
    _check_paired(before, after)
    old, new = (table.of(component).astype(np.float64) for table in (before, after))
    deviation = _deviation(old)
    mean, error = _clustered((new - old).mean(axis=1) / deviation)
    return Gain(
        before=float(old.mean()),
        after=float(new.mean()),
        standard_deviation=deviation,
        gain_sd=mean,
        standard_error=error,
    )


def contrast(
    real: Sequence[EvaluationTable],
    control: Sequence[EvaluationTable],
    base: Sequence[EvaluationTable],
    component: str | None = None,
) -> Contrast:
    """Paired difference of two arms over several seeds, clustered by prompt.

    Per prompt the mean over seeds and noises of (real - control) / SD of that seed's base; the
    error is the standard deviation over prompts over sqrt(R). `contrast(after, before, before)`
    is the gain pooled over seeds. ValueError if the tables do not pair.
    """
    if not real or not len(real) == len(control) == len(base):
        raise ValueError(
            f"{len(real)} runs against {len(control)} controls and {len(base)} bases: pair them "
            "seed by seed"
        )
    per_seed = []
    for one, other, start in zip(real, control, base, strict=True):
        _check_paired(start, one)
        _check_paired(start, other)
        _check_paired(base[0], start)
        difference = one.of(component).astype(np.float64) - other.of(component)
        per_seed.append(difference.mean(axis=1) / _deviation(start.of(component)))
    mean, error = _clustered(np.mean(per_seed, axis=0))
    return Contrast(mean_sd=mean, standard_error=error, z=_ratio(mean, error),
                    num_prompts=base[0].prompt_R.size, num_seeds=len(real))  # fmt: skip


def summarise(
    before: EvaluationTable,
    after: EvaluationTable,
    *,
    held_out: Sequence[str] = (),
    updates: int,
    seconds_per_update: float,
    ranks: int,
    **more: Any,
) -> dict[str, Any]:
    """The run's result as one JSON-ready mapping; `more` is added as it is.

    `held_out_before` and `held_out_after` are means over the held-out rewards, null without any.
    """
    total = paired_gain(before, after)
    components = {}
    for name in before.components:
        gain = paired_gain(before, after, name)
        components[name] = {
            "before": gain.before,
            "after": gain.after,
            "gain_sd": gain.gain_sd,
            "standard_error": gain.standard_error,
            "held_out": name in held_out,
        }
    watched = [components[name] for name in held_out]
    return {
        "reward_before": total.before,
        "reward_after": total.after,
        "gain_sd": total.gain_sd,
        "standard_error": total.standard_error,
        "components": components,
        "held_out_before": _mean_or_none([float(c["before"]) for c in watched]),
        "held_out_after": _mean_or_none([float(c["after"]) for c in watched]),
        "updates": updates,
        "seconds_per_update": seconds_per_update,
        "ranks": ranks,
        "prompts": int(before.prompt_R.size),
        "videos": int(before.composite_RM.size),
        **more,
    }


def to_json(summary: Mapping[str, Any], indent: int | None = None) -> str:
    """One line of JSON (or indented). ValueError for a value that JSON cannot hold, nan too."""
    return json.dumps(dict(summary), allow_nan=False, indent=indent)


def _clustered(value_R: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean over prompts and its standard error."""
    return float(value_R.mean()), float(value_R.std(ddof=1) / math.sqrt(value_R.size))


def _deviation(score_RM: npt.NDArray[Any]) -> float:
    return max(float(score_RM.astype(np.float64).std(ddof=1)), _SMALLEST_SD)


def _ratio(mean: float, error: float) -> float:
    if error > 0:
        return mean / error
    return math.copysign(math.inf, mean) if mean else 0.0


def _mean_or_none(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _check_paired(before: EvaluationTable, after: EvaluationTable) -> None:
    if before.components != after.components:
        raise ValueError(
            f"tables score {list(before.components)} and {list(after.components)}: evaluate both "
            "with the same rewards"
        )
    same_prompts = np.array_equal(before.prompt_R, after.prompt_R)
    if not same_prompts or before.composite_RM.shape != after.composite_RM.shape:
        raise ValueError(
            f"tables of {before.composite_RM.shape} and {after.composite_RM.shape} prompts x "
            "noises do not pair: evaluate both on the same prompts and noises"
        )
