"""How many steps a dispatch of a stream runs."""

from __future__ import annotations

# Seconds that a piece of a stream may wait for: nobody sees them, and the host's part
# of a dispatch is small beside them.
UNSEEN = 0.03


class Pace:
    """As many steps per dispatch as nobody who reads the stream can notice.

    The first dispatch has one step, so that the first token comes at once. While a
    dispatch takes less than half of `UNSEEN` the next one runs twice as many steps, and
    half as many after one that took longer than `UNSEEN`.

    Attributes:
      steps: of the next dispatch, at most.
    """

    def __init__(self):
        self.steps = 1

    def took(self, seconds: float, longest: int) -> None:
        """Takes in how long a dispatch took.

        Args:
          seconds: that its caller waited.
          longest: steps that a dispatch can run.
        """
        if seconds > UNSEEN:
            self.steps = max(1, self.steps // 2)
        elif seconds < UNSEEN / 2:
            self.steps = min(2 * self.steps, longest)
