"""What is served: SmolLM2 with the calculator (`make weights`), or fake models whose passes take a fixed time."""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from collm.bench.synthetic import make_tokenizer
from collm.data.formatting import Formatter
from collm.llm import CollaborativeLM
from collm.models.fake import FakeModel
from collm.serving.app import make_app
from collm.serving.limits import Limits
from collm.serving.server import address, bind, listen, make_server, run
from collm.values import Query, Replies

CHECKPOINT = Path(__file__).parents[2] / "pretrained" / "smollm2-135m-calculator"
NAMES = ("smollm2", "fakes")
WORDS = 256
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


class Paced(FakeModel):
    """A fake model of which every pass takes `seconds`, whatever it serves."""

    seconds = 0.0

    def predict(self, queries: Sequence[Query]) -> Replies:
        time.sleep(self.seconds)
        return super().predict(queries)


def load(name: str, *, pass_seconds: float = 0.02, max_num_seqs: int = 16) -> CollaborativeLM:
    if name == "smollm2":
        return CollaborativeLM.from_pretrained(CHECKPOINT, max_num_seqs=max_num_seqs, timeout=600)
    tokenizer = make_tokenizer(WORDS)
    tokenizer.chat_template = TEMPLATE
    models = [
        Paced("base", WORDS, num_assistants=1, agreement=0.5, concentration=0.05),
        Paced("helper", WORDS, agreement=0.5, concentration=0.05),
    ]
    models[0].seconds, models[1].seconds = pass_seconds, 2 * pass_seconds
    # A pass has a time limit, as in `collm serve`.
    return CollaborativeLM(
        models, [Formatter(tokenizer)] * 2, max_num_seqs=max_num_seqs, max_model_len=8192, timeout=600
    )


def question(name: str, rng: random.Random, length: int = 0) -> str:
    """A question; with `length`, about so many tokens of other things before it."""
    if name == "fakes":
        return " ".join(f"t{rng.randrange(1, WORDS)}" for _ in range(length or 30))
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    before = "".join(f"Box {rng.randint(100, 999)} holds {rng.randint(10, 99)} pens. " for _ in range(length // 14))
    return f"{before}Nina packs {a} boxes of {b} pencils. How many pencils does she pack in all?"


@contextmanager
def served(llm: CollaborativeLM, limits: Limits | None = None) -> Iterator[str]:
    """The server in a thread of this process, which is what `collm serve` has but for the thread; its address."""
    listening = bind("127.0.0.1", 0)
    server = make_server(make_app(llm, "pair", limits=limits), timeout_graceful_shutdown=5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address(listening)
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--pass-seconds", type=float, default=0.002)
    arguments = parser.parse_args()
    listening = bind("127.0.0.1", 0)
    app = make_app(load(arguments.name, pass_seconds=arguments.pass_seconds), "pair", limits=Limits(max_queue=64))
    listen(listening)
    print(address(listening), flush=True)
    run(app, listening)
