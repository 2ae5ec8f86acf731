"""What the server costs beside the engine, and whether it lasts.

    python benchmarks/serve speed [--system smollm2] [--rounds 7]
    python benchmarks/serve prompt [--system smollm2]
    python benchmarks/serve soak [--system fakes] [--seconds 600] [--requests 5000]

On this machine alone, with a bounded number of connections. `speed` asks that the server gives at least 0.95 of the
engine's tokens/s at 1, 4 and 16 streams; `prompt` that a prompt of 4,000 tokens raises the 95th percentile of the time
between the tokens of others at most twofold; `soak` that memory, descriptors and threads stay flat, that nothing gets a
500, and that the places of clients that went away are free again. Ratios are of neighbours in time; a run fails only if
their whole interval lies on the wrong side.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from reporting import report
from soak import soak
from speed import ASKED, long_prompt, speed
from systems import NAMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "prompt", "soak"])
    parser.add_argument("--system", choices=NAMES, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--length", type=int, default=4000, help="of the long prompt")
    parser.add_argument("--streams", type=int, default=4, help="short texts beside the long prompt")
    parser.add_argument("--texts", type=int, default=4, help="in each run of speed, at least")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--at-once", type=int, default=24)
    parser.add_argument("--pass-seconds", type=float, default=0.002, help="of the fake base, in the soak")
    parser.add_argument("--json", type=Path, default=Path("runs/serve.json"))
    options = parser.parse_args()
    if options.what == "soak":
        found = soak(
            options.system or "fakes",
            options.seconds,
            options.requests,
            options.at_once,
            options.tokens or 60,
            options.pass_seconds,
        )
        report(found, {}, options.json)
        sys.exit(_soak_faults(found) or 0)
    system = options.system or "smollm2"
    if options.what == "speed":
        result, ratios = speed(system, options.rounds, options.tokens or 48, options.texts)
        wrong = any(ratio.high < ASKED for ratio in ratios.values())
    else:
        result, ratios = long_prompt(system, options.rounds, options.tokens or 200, options.length, options.streams)
        wrong = any(ratio.low > 2 for ratio in ratios.values())
    report(result, ratios, options.json)
    sys.exit("outside of what is asked" if wrong else 0)


def _soak_faults(found: dict[str, object]) -> str:
    flat, outcomes, idle = found["second_and_last_quarter"], found["outcomes"], found["idle"]
    assert isinstance(flat, dict) and isinstance(outcomes, dict) and isinstance(idle, dict)
    faults = [f"{name}: {before} to {after}" for name, (before, after) in flat.items() if after > 1.1 * before + 8]
    faults += [f"{count} times {what}" for what, count in outcomes.items() if what not in ("200", "400", "429", "left")]
    faults += [f"{name} is {idle[name]}" for name in idle if name.startswith(("num_", "kv_")) and idle[name]]
    if found["exit"] != 0:
        faults.append(f"it ended with {found['exit']}")
    return "; ".join(faults)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
