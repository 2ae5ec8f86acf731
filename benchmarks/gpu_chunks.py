"""Two tiny Llamas with different tokenizers, in float32: texts that graphs write in chunks, against those of the twin
that recomputes every token. On a bare machine, as `gpu.py`:

    python benchmarks/gpu_chunks.py [--device cuda|cpu] [--texts 8] [--limit 48] [--out FILE]

Prints JSON. `equal`: the share of texts whose chunks and authors are all those of the twin; `graph_share`: the share of
decoding passes that ran as graphs. On a CPU the twins of the kernels run, and a fake captures them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
import warnings
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import gpu  # it finds this repository's source, and does without pydantic
import torch
from chunk_toys import byte_level
from tiny import make_model

from collm.decoding.chunk_text import ChunkText
from collm.decoding.chunked import chunked
from collm.decoding.policies import ByEntropy, Random, Threshold
from collm.engine import Engine, Finished
from collm.models.codec import ByteCodec, vocabulary
from collm.models.head import DeferralHead
from collm.models.local import LocalModel
from collm.models.pairing import cuts_between
from collm.sampling_params import SamplingParams

NAMES = "base", "other"
PROMPTS = "12 + 30 =", "How many apples?", "Paris is", "def mean(", "The train", "x = [1, 22", "Größe: ", "56 * 9"


def machinery(network: Any) -> Any:
    return gpu.own_machinery(SimpleNamespace(cuda=network.device.type == "cuda", networks={"base": network}))


def network_of(tokenizer: Any, seed: int, device: str) -> Any:
    """Random, with laws far from uniform; no special token is chosen, and what it writes is ASCII."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2 + seed, "num_attention_heads": 8,
             "max_position_embeddings": 1024}  # fmt: skip
    network = make_model(seed=seed, vocab_size=len(tokenizer) + 3, initializer_range=0.12, **shape)
    pieces = vocabulary(tokenizer)
    with torch.no_grad():
        barred = [v for v, piece in enumerate(pieces) if piece is None or not piece.isascii()]
        network.lm_head.weight[[*barred, *tokenizer.all_special_ids]] = 0.0
    return network.to(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--limit", type=int, default=48, help="tokens of the base in a text")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    began = time.perf_counter()
    tokenizers = [byte_level("gpt2", 400), byte_level("llama3", 460, seed=1)]
    cuts = cuts_between(tokenizers, NAMES)
    assert cuts is not None
    codecs = [ByteCodec(tokenizer, cuts) for tokenizer in tokenizers]
    networks = [network_of(tokenizer, seed, given.device) for seed, tokenizer in enumerate(tokenizers)]
    head = DeferralHead(256, 1).to(given.device)
    torch.manual_seed(7)
    torch.nn.init.normal_(head.weight, std=0.1)

    def models_of(cache: bool) -> list[LocalModel]:
        made = []
        for number, (network, tokenizer, codec, name) in enumerate(
            zip(networks, tokenizers, codecs, NAMES, strict=True)
        ):
            own = {"machinery": machinery(network), "num_slots": 16, "max_cache_tokens": 4096} if cache else {}
            model = LocalModel(network, tokenizer, None if number else head, name=name, cache=cache, **own)
            model.share_chunks(cuts, codec.first_bytes)
            if cache:
                model.warm_up()
            made.append(model)
        return made

    found: dict[str, Any] = {"device": given.device, "torch": torch.__version__, "cases": {}, "warnings": []}
    if given.device.startswith("cuda"):
        found["card"] = torch.cuda.get_device_name()

    def written(engine: Engine, batch: int, policy: Any, params: SamplingParams, ahead: bool) -> list[Any]:
        """What each text became: its chunks, and who wrote them."""
        done: SimpleQueue[Any] = SimpleQueue()
        texts: list[ChunkText] = []
        authors: list[list[int]] = [[] for _ in range(given.texts)]
        for first in range(0, given.texts, batch):
            for number in range(first, min(first + batch, given.texts)):
                rng = random.Random(number)
                prompt = f"{PROMPTS[number % len(PROMPTS)]} {rng.randrange(1000)}"
                ids = [tokenizer.encode(prompt, add_special_tokens=False) for tokenizer in tokenizers]
                text = ChunkText(ids, codecs, cuts)
                texts.append(text)
                own = SamplingParams(max_tokens=given.limit, temperature=params.temperature, top_p=params.top_p,
                                     seed=100 + number)  # fmt: skip
                flow = chunked(text, own, policy, tokenizers[0].eos_token_id, ahead=ahead)

                def sink(event: Any, number: int = number) -> None:
                    if isinstance(event, Finished):
                        done.put(event)
                    else:
                        authors[number].append(event.author)

                engine.submit(flow, text, given.limit, sink)
            for _ in range(min(batch, given.texts - first)):
                event = done.get(timeout=120)
                if event.error is not None:
                    raise RuntimeError(event.error)
        return [(text.chunks, own) for text, own in zip(texts, authors, strict=True)]

    policies = {"gate": Threshold(0.0), "entropy": ByEntropy(4.2, 1), "random": Random(0.4, 1)}
    ways = {"greedy": SamplingParams(), "drawn": SamplingParams(temperature=0.8, top_p=0.9)}
    cases = [(policy, way, batch, ahead) for policy in policies for way in ways for batch in (1, given.texts)
             for ahead in (False, True)]  # fmt: skip
    results: dict[bool, dict[Any, Any]] = {True: {}, False: {}}
    passes: dict[str, int] = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            for cache in (True, False):
                models = models_of(cache)
                for model in models:
                    model.on_pass = lambda one, name=model.name: passes.__setitem__(name, passes.get(name, 0) + 1)
                engine = Engine(models, max_num_seqs=max(2, given.texts))
                try:
                    for case in cases:
                        policy, way, batch, ahead = case
                        if cache or (batch > 1 and not ahead):  # neither changes a text
                            found_now = written(engine, batch, policies[policy], ways[way], ahead)
                            results[cache][case] = found_now
                finally:
                    engine.close()
                if cache:
                    steppers = {m.name: stepper for m in models if (stepper := m.graphs[0])}
                    found["graphs"] = {name: list(stepper.buckets) for name, stepper in steppers.items()}
                    launched = {name: sum(stepper.counts.passes.values()) for name, stepper in steppers.items()}
                    found["graph_share"] = {name: launched.get(name, 0) / max(1, passes[name]) for name in NAMES}
        except BaseException as error:
            found["error"] = "".join(traceback.format_exception(error))[-3000:]
    for case in cases:
        policy, way, batch, ahead = case
        mine, twin = results[True].get(case), results[False].get((policy, way, given.texts, False))
        if mine is None or twin is None:
            continue
        by = [author for _, own in twin for author in own]
        first = [
            next((n for n, pair in enumerate(zip(a[0], b[0], strict=False)) if pair[0] != pair[1]), None)
            for a, b in zip(mine, twin, strict=True) if a != b
        ]  # fmt: skip
        found["cases"][f"{policy}.{way}.b{batch}{'.ahead' if ahead else ''}"] = {
            "equal": sum(a == b for a, b in zip(mine, twin, strict=True)) / len(twin),
            "chunks": len(by), "by_other": sum(map(bool, by)) / max(1, len(by)), "first_differences": first,
        }  # fmt: skip
    equal = [case["equal"] for case in found["cases"].values()]
    found["equal"] = sum(equal) / len(equal) if equal else None
    found["warnings"] = sorted({str(each.message)[:200] for each in told})
    found["seconds"] = round(time.perf_counter() - began, 1)
    whole = json.dumps(found, indent=1)
    print(whole)
    if given.out:
        given.out.write_text(whole + "\n")
    return 1 if "error" in found else 0


if __name__ == "__main__":
    sys.exit(main())
