"""Is the reward being gamed? Held-out rewards that fall while the trained ones rise say so."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_kvpo import log
from megatron_kvpo.reward_config import GuardConfig
from megatron_kvpo.training.summary import EvaluationTable, paired_gain

logger = log.get_logger(__name__)


class Guard:
    """Counts evaluations in a row at which trained and held-out rewards have parted ways."""

    def __init__(self, config: GuardConfig, held_out: Sequence[str]) -> None:
        self._config, self._held_out = config, tuple(held_out)
        self.strikes = 0
        """Such evaluations so far, in a row; a checkpoint keeps it."""

    @property
    def sounds(self) -> bool:
        """Whether there have been reward.guard.patience of them."""
        return self.strikes >= self._config.patience

    @property
    def stops(self) -> bool:
        """Whether the run is to end."""
        return self.sounds and self._config.stop

    def watch(self, base: EvaluationTable, now: EvaluationTable) -> dict[str, float]:
        """Look at one more evaluation; what to log, in standard deviations of the base."""
        gain = paired_gain(base, now).gain_sd
        changes = {name: paired_gain(base, now, name).gain_sd for name in self._held_out}
        fallen = {n: c for n, c in changes.items() if c < -self._config.tolerance_sd}
        self.strikes = self.strikes + 1 if gain > 0 and fallen else 0
        if self.sounds:
            worst = ", ".join(f"{name} {change:+.2f}" for name, change in fallen.items())
            logger.warning(
                "the trained reward has risen by %+.2f SD while held-out ones fell (%s), %d "
                "evaluations in a row: look at the videos, this is how a gamed reward looks%s",
                gain, worst, self.strikes, "; the run ends here" if self.stops else "",
            )  # fmt: skip
        return {
            "gain_sd": gain, "diverged": float(self.strikes),
            **{f"{name}_sd": change for name, change in changes.items()},
        }  # fmt: skip
