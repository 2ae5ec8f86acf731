"""What a pair behind servers would write, by deferral rate and number of streams: a simulation, nothing is measured.

    python benchmarks/simulate_servers.py --base 7 --assistant 70 --assistant-gpus 4 [--replicas 1,2,4] [--company 8]
    python benchmarks/simulate_servers.py --costs costs.json

The engine's own scheduler and flows run on a clock of their own, over servers that take time
(`collm.bench.simulation`). What steps and calls cost comes from sizes in billions of parameters (the arithmetic is in
docs/scaling.md), or from a JSON file with what was measured: {"base": {"step": 0.01, ...}, "assistant": {...}}, the
fields of `ServerCosts`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from collm.bench.simulation import Load, ServerCosts, gpu_costs, simulate


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=float, default=7, help="billions of parameters")
    parser.add_argument("--assistant", type=float, default=70)
    parser.add_argument("--base-gpus", type=int, default=1)
    parser.add_argument("--assistant-gpus", type=int, default=4)
    parser.add_argument("--costs", type=Path, help="what was measured, instead")
    parser.add_argument("--rates", type=numbers, default=[0.0, 0.1, 0.3, 0.5])
    parser.add_argument("--streams", type=numbers, default=[1, 16, 128, 1024])
    parser.add_argument("--replicas", type=numbers, default=[1], help="of the assistant, 1 to 64")
    parser.add_argument("--base-replicas", type=int, default=1)
    parser.add_argument("--company", type=int, default=1, help="requests that an idle assistant waits for")
    parser.add_argument("--patience", type=float, default=0.005, help="seconds for which it does")
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--prompt", type=int, default=256)
    options = parser.parse_args()
    if options.costs is None:
        base, assistant = (
            gpu_costs(options.base, options.base_gpus),
            gpu_costs(options.assistant, options.assistant_gpus),
        )
    else:
        told = json.loads(options.costs.read_text())
        base, assistant = ServerCosts(**told["base"]), ServerCosts(**told["assistant"])
    if options.company > 1:
        assistant = replace(assistant, company=options.company, patience=options.patience)
    print(f"base {asdict(base)}\nassistant {asdict(assistant)}\n")
    print("| streams | replicas |" + "".join(f" rate {rate:g} |" for rate in options.rates))
    print("|---|---|" + "---|" * len(options.rates))
    for streams in map(int, options.streams):
        for replicas in map(int, options.replicas):
            row = f"| {streams} | {replicas} |"
            for rate in options.rates:
                load = Load(streams, rate, options.tokens, options.prompt, texts=max(2 * streams, 4))
                found = simulate(
                    base, assistant, load, base_replicas=options.base_replicas, assistant_replicas=replicas
                )
                busy = " + ".join(f"{share:.0%}" for share in found.busy)
                row += f" {found.tokens_per_second:,.0f} ({busy}) |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
