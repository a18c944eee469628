"""When prompts wait a few steps, so that several of them share one. Plain numbers."""

# A prompt waits at most so many steps. At 32 requests in flight, a cycle of turns gets about one
# prompt. Three more then come while it waits.
MAX_WAIT = 3
# With so many tokens of prompts, a step is bound by arithmetic. More of them would save nothing.
ENOUGH_TOKENS = 1024
# Steps over which arrivals are averaged.
HORIZON = 32


class PromptGate:
    """Decides before each step whether prompts wait for others.

    A step that reads prompts cannot use full CUDA graphs of the first turn's pass and of readings.
    It costs about the same for one short prompt as for several. Prompts wait only where others can
    be expected to come meanwhile.
    """

    def __init__(self) -> None:
        self.per_step = 0.0
        """Prompts that arrive per step, the mean of the last steps"""
        self._num_arrived = self._num_waited = 0

    def arrive(self) -> None:
        """A prompt has come since the last step."""
        self._num_arrived += 1

    def waits(self, num_tokens: int) -> bool:
        """Whether the prompts in hand, `num_tokens` long together, wait in the coming step.

        Call this once a step.
        """
        self.per_step += (self._num_arrived - self.per_step) / HORIZON
        self._num_arrived = 0
        others_come = self.per_step * MAX_WAIT >= 1
        has_room = 0 < num_tokens < ENOUGH_TOKENS and self._num_waited < MAX_WAIT
        waits = others_come and has_room
        self._num_waited = self._num_waited + 1 if waits else 0
        return waits
