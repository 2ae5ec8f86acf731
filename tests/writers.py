"""A pair that writes without any weights: what evaluation and calibration ask of a system, in microseconds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

from collm.data.examples import Example
from collm.decoding.policies import Policy, Threshold, to_log_odds
from collm.sampling_params import SamplingParams
from collm.types import Generation, Message, Step, Usage


def draw(*key: object) -> float:
    """Uniform in (0, 1), a hash of the key."""
    return (int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "big") + 0.5) / 2**48


class PairWriter:
    """Writes `length` letters, then `#### n`; n is the right answer if an assistant wrote at least `needed` letters.

    Base and assistant write different letters and the gate hashes all that was written, so that texts and gates shift
    with the threshold; the last line has a gate of about 0. The assistant hands back a share `abstention` of its
    tokens. After `fail_after` texts it raises KeyboardInterrupt, as Ctrl-C does.
    """

    model_names = ("base", "helper")

    def __init__(
        self,
        length: int = 12,
        abstention: float = 0.0,
        needed: int = 3,
        gated: bool = True,
        fail_after: int | None = None,
    ) -> None:
        self.length, self.abstention, self.needed, self.gated = length, abstention, needed, gated
        self.fail_after = fail_after
        self.written = 0
        self.seeds: list[int] = []

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def generate_each(
        self,
        prompts: Sequence[Sequence[Message] | str],
        params: SamplingParams | Sequence[SamplingParams],
        batch_size: int = 8,
        *,
        policy: Policy | None = None,
        alone: int | str | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """Batches run from last to first: texts are not finished in the order of their prompts."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        for start in range(0, len(prompts), batch_size):
            for i in reversed(range(start, min(start + batch_size, len(prompts)))):
                yield i, self._write(prompts[i], each[i], policy, alone)

    def _write(
        self, prompt: Sequence[Message] | str, params: SamplingParams, policy: Policy | None, alone: int | str | None
    ) -> Generation:
        if self.fail_after is not None and self.written >= self.fail_after:
            raise KeyboardInterrupt
        self.written += 1
        self.seeds.append(params.seed)
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        eta = to_log_odds(0.5 if params.threshold is None else params.threshold)
        if isinstance(policy, Threshold):
            eta = policy.log_odds
        if alone is not None:
            eta = -math.inf if alone in (1, "helper") else math.inf
        steps: list[Step] = []
        while len(steps) < self.length:
            written = tuple(step.token_id for step in steps)
            gate = draw("gate", question, written)
            wants = math.log(gate) - math.log1p(-gate) > eta
            answers = draw("answers", question, written) >= self.abstention
            base = ord("a") + int(26 * draw("base", question, written))
            helper = ord("A") + int(26 * draw("helper", question, written))
            author = int(wants and answers)
            law = (1 - gate, gate) if self.gated else ()
            steps.append(Step(helper if author else base, author, -0.5, law, base, wants and not answers))
        answer = int(question.split()[-1]) + (sum(step.author for step in steps) < self.needed)
        law = (1.0 - 1e-9, 1e-9) if self.gated else ()
        author = int(eta == -math.inf and not self.abstention)
        steps.extend(Step(ord(letter), author, -0.1, law, ord(letter)) for letter in f"\n#### {answer}")
        pieces = tuple(chr(step.token_id) for step in steps)
        passes = (len(steps), sum(step.author or step.abstained for step in steps))
        usage = Usage(forward_passes=passes)
        return Generation("".join(pieces), tuple(steps), pieces, "stop", len(question), self.model_names, usage)


def questions(count: int) -> list[Example]:
    return [
        Example(
            id=f"q{i}",
            messages=({"role": "user", "content": f"What is {i}"}, {"role": "assistant", "content": f"#### {i}"}),
            fields={"answer": str(i)},
        )
        for i in range(count)
    ]
