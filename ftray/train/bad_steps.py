"""What happens to a step whose loss or gradient is not finite: it is skipped, counted, and limited."""

from __future__ import annotations

import math

from ftray import config
from ftray.errors import RunError
from ftray.train.checkpoint.catalog import RunProgress


class BadStepPolicy:
    """Counts bad steps in the run's progress, and decides when to rewind or to end the run.

    Args:
        max_bad_steps: Bad steps of the whole run that are tolerated.
        rewind_after: Bad steps in a row after which the last checkpoint is restored; None: never.
    """

    def __init__(self, max_bad_steps: int, rewind_after: int | None) -> None:
        self._max_bad_steps, self._rewind_after = max_bad_steps, rewind_after

    @classmethod
    def from_config(cls, train: config.TrainConfig) -> BadStepPolicy:
        """The policy of the section `train`."""
        return cls(train.max_bad_steps, train.rewind_after)

    def count(self, progress: RunProgress, loss_sum: float, updated: bool, lowered_scale: bool) -> None:
        """Counts a step.

        Args:
            progress: Is changed.
            loss_sum: Over all ranks.
            updated: Whether the optimizer changed the weights.
            lowered_scale: Whether fp16's loss scale was lowered, which explains a skipped step with a finite loss.
        """
        progress.num_updates += updated
        is_bad = not (updated or (math.isfinite(loss_sum) and lowered_scale))
        progress.num_bad_steps += is_bad
        progress.bad_in_row = progress.bad_in_row + 1 if is_bad else 0

    def check(self, progress: RunProgress) -> None:
        """Raises RunError when more steps were bad than allowed."""
        if progress.num_bad_steps > self._max_bad_steps:
            raise RunError(
                f"step {progress.step - 1}: {progress.num_bad_steps} steps had a non-finite loss or gradient. The limit "
                f"train.max_bad_steps is {self._max_bad_steps}. Lower train.learning_rate or check the data"
            )

    def rewinds(self, progress: RunProgress) -> bool:
        """Whether the last checkpoint is to be restored now."""
        return progress.bad_in_row == self._rewind_after
