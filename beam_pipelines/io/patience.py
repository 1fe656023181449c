"""How long a sink goes on trying."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Patience:
    """How long a call that fails for a passing reason is repeated.

    Waits double from the first to the longest one; each is cut by a random part, up to
    half, so that workers which failed together don't come back together.

    Args:
      limit_s: Seconds after the first attempt in which another may begin.
      first_wait_s: The wait after the first failure, in seconds.
      longest_wait_s: The longest wait, in seconds.
      clock: Seconds that only grow.
      sleep: Waits so many seconds.
    """

    limit_s: float = 90
    first_wait_s: float = 0.1
    longest_wait_s: float = 5
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def repeat(self, attempt: Callable[[], None], passes: Callable[[Exception], bool]) -> None:
        """Call `attempt` until it succeeds.

        Args:
          attempt: What to do; it may be done twice.
          passes: Whether an error of it may be gone the next time.

        Raises:
          Exception: the error of the last attempt, where it won't pass or time is up.
        """
        started, wait_s = self.clock(), self.first_wait_s
        while True:
            try:
                return attempt()
            except Exception as error:
                left_s = started + self.limit_s - self.clock()
                if left_s <= 0 or not passes(error):
                    raise
            self.sleep(min(wait_s, left_s) * random.uniform(0.5, 1))
            wait_s = min(2 * wait_s, self.longest_wait_s)


DEFAULT_PATIENCE = Patience()
"""What a restart of a server takes, and then some."""
