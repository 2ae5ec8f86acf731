"""Whom should one ask where? Signals against each other on gold text, from what `collm oracle --out` has read.

    python recipes/families/paired.py ORACLE.jsonl [--rate 0.1 ...] [--beside OTHER.jsonl] [--drafts RESULT.json]

At each rate a signal gives away the chunks where it is highest: of several assistants to the one with the largest gate,
by chance to one drawn evenly. Shares of right chunks, and paired differences with 95 % intervals over problems
(bootstrap). Of several assistants also what the gate does with one of them alone, as if the others were not there.
`--beside`: what another system made of the same chunks.

`--drafts`: what speculation could gain, that is, if the base drafted through its deferrals as if it were agreed with,
and an assistant judged all chunks of a draft in one pass: accepted is what is equal, a draft ends behind the first that
is not, and what the base has written behind it is lost. In the place of passes that were counted (of a result of
`collm eval`: its assistants' passes for each of their chunks) there is one for each draft, and one more for a chunk
that the assistant writes itself. Gold text tells whether two models write the same only where one of them is right;
where all are wrong none may be equal, or all, or as many as make the share that the result tells (by lot).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
AGAINST = ("gate", "random"), ("gate", "entropy"), ("gate", "top probability"), ("expected gain", "entropy")
AGAINST += ("expected gain", "top probability"), ("expected gain", "gate")


@dataclass(frozen=True)
class Reading:
    """What a system made of gold text, chunk by chunk.

    `names`: of its assistants; `of` `[N]`: the problem of a chunk; `right` `[N, 1+K]`: of base and assistants;
    `signals`: what is highest where an assistant shall write `[N]`, and which one that is, from 1.
    """

    names: list[str]
    ids: list[str]
    of: NDArray[np.int64]
    right: Floats
    signals: dict[str, tuple[Floats, NDArray[np.int64]]]

    @staticmethod
    def of_file(path: Path) -> Reading:
        header, *rows = [json.loads(line) for line in path.read_text().splitlines()]

        def chunks(name: str) -> Floats:
            return np.concatenate([np.array(row[name], np.float64) for row in rows])

        log_gate, top = chunks("gate"), chunks("top")[:, 0]
        share = np.exp(log_gate[:, 1:])
        gate, whom = share.sum(axis=1), 1 + share.argmax(axis=1)
        # The base may be sure to the last bit: `decoding/policies.py`.
        gain = gate * np.maximum(-np.expm1(top), 2.0**-24)
        signals = {"gate": gate, "expected gain": gain, "entropy": chunks("entropy"), "top probability": -top}
        found = {name: (signal, whom) for name, signal in signals.items()}
        names = [str(name) for name in header["models"][1:]]
        if len(names) > 1:
            for z, name in enumerate(names, start=1):
                found[f"gate, {name} alone"] = log_gate[:, z] - log_gate[:, 0], np.full(len(whom), z)
        of = np.repeat(np.arange(len(rows)), [len(row["right"]) for row in rows])
        return Reading(names, [str(row["id"]) for row in rows], of, chunks("right"), found)

    def chosen(self, rate: float) -> dict[str, Floats]:
        """Whether who writes is right, if a signal gives so many chunks away, `[N]`."""
        right = self.right
        found = {"random": (1 - rate) * right[:, 0] + rate * right[:, 1:].mean(axis=1)}
        for name in self.signals:
            writer = self.writer(name, rate)
            found[name] = right[np.arange(len(writer)), writer]
        return found

    def equal(self, writer: NDArray[np.int64]) -> Floats:
        """Whether who writes a chunk writes what the base would: 0 or 1, NaN where nobody knows, `[N]`."""
        own = self.right[np.arange(len(writer)), writer]
        return np.where((own == 0) & (self.right[:, 0] == 0), np.nan, own == self.right[:, 0])

    def drafted(self, writer: NDArray[np.int64], equal: NDArray[np.bool_], pending: int) -> tuple[int, int]:
        """Passes of base and assistants if chunks are drafted until so many are to be judged."""
        of_base = of_assistants = 0
        for problem in range(len(self.ids)):
            where = np.nonzero(self.of == problem)[0]
            at, stop = int(where[0]), int(where[-1]) + 1
            while at < stop:
                asked = at + np.nonzero(writer[at:stop])[0][:pending]
                end = int(asked[-1]) + 1 if len(asked) == pending else stop
                refused = next((int(n) for n in asked if not equal[n]), None)
                of_base += end - at
                of_assistants += (len(asked) > 0) + (refused is not None)
                at = end if refused is None else refused + 1
        return of_base, of_assistants

    def writer(self, name: str, rate: float) -> NDArray[np.int64]:
        """Who writes each chunk by a signal at a rate, `[N]`; 0 is the base."""
        signal, whom = self.signals[name]
        writer = np.zeros(len(signal), np.int64)
        picked = np.argsort(-signal, kind="stable")[: round(rate * len(signal))]
        writer[picked] = whom[picked]
        return writer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reading", type=Path)
    parser.add_argument("--rate", type=float, action="append", help="[default: 0.1, 0.2, 0.4, the gate's at 0.5]")
    parser.add_argument("--beside", type=Path, help="of another pair, on the same text")
    parser.add_argument("--drafts", type=Path, metavar="RESULT", help="what speculation could gain on its passes")
    arguments = parser.parse_args()
    own = Reading.of_file(arguments.reading)
    other = None if arguments.beside is None else Reading.of_file(arguments.beside)
    if other is not None and (own.ids, *own.of) != (other.ids, *other.of):
        sys.exit(f"Error: {arguments.beside} is of other text, or cuts it elsewhere")
    weights = np.random.default_rng(0).multinomial(len(own.ids), np.full(len(own.ids), 1 / len(own.ids)), size=4000)
    counts = np.bincount(own.of)

    def told(values: Floats) -> str:
        low, high = np.percentile(weights @ np.bincount(own.of, values) / (weights @ counts), [2.5, 97.5])
        return f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"

    right = own.right
    names = ["base", *own.names]
    print(f"{len(own.ids)} problems, {len(own.of)} chunks; right: ", end="")
    print(", ".join(f"{name} {told(right[:, z])}" for z, name in enumerate(names)), end="; ")
    print(f"one of them {told(right.max(axis=1))};")
    alone = [(right[:, z] > np.delete(right, z, axis=1).max(axis=1)).mean() for z in range(len(names))]
    print("only this one: " + ", ".join(f"{name} {share:.1%}" for name, share in zip(names, alone, strict=True)))
    if other is not None:
        print(f"base less the other base: {told(right[:, 0] - other.right[:, 0])}")
    for rate in arguments.rate or (0.1, 0.2, 0.4, float((own.signals["gate"][0] > 0.5).mean())):
        chosen = own.chosen(rate)
        print(f"at {rate:.1%}: " + "; ".join(f"{name} {told(values)}" for name, values in chosen.items()))
        for one, against in (*AGAINST, *(("gate", name) for name in own.signals if name.endswith(" alone"))):
            print(f"    {one} less {against}: {told(chosen[one] - chosen[against])}")
        if len(own.names) > 1:
            shares = np.bincount(own.writer("gate", rate), minlength=len(names)) / len(own.of)
            print(
                "    by the gate: "
                + ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True))
            )
        if arguments.drafts is not None:
            tell_drafts(own, own.writer("gate", rate), arguments.drafts)
        if other is not None:
            for name, values in other.chosen(rate).items():
                print(f"    {name} less that of the other pair: {told(chosen[name] - values)}")


def tell_drafts(reading: Reading, writer: NDArray[np.int64], result: Path) -> None:
    """In passes, and in time where a pass of an assistant costs that many of the base."""
    told = json.loads(result.read_text())
    written, passes = (sum(told[key].values()) - told[key]["base"] for key in ("written_by", "forward_passes"))
    each, asked = passes / written, int((writer > 0).sum())
    starts = (writer > 0) & np.concatenate([[True], (writer[:-1] == 0) | (np.diff(reading.of) > 0)])
    print(f"    {asked} chunks in {int(starts.sum())} runs of deferrals; passes of assistants now {each * asked:.0f}")
    equal = reading.equal(writer)
    unknown, known = np.isnan(equal[writer > 0]).mean(), np.nanmean(equal[writer > 0])
    seen = 1 - told["changed_tokens"] / written
    share = min(1.0, max(0.0, (seen - known * (1 - unknown)) / unknown))
    lot = np.random.default_rng(0).random(len(equal))
    for name, wrong in (("none", 0.0), (f"{share:.0%}", share), ("all", 1.0)):
        same = np.where(np.isnan(equal), lot < wrong, equal == 1)
        drafts = {pending: reading.drafted(writer, same, pending) for pending in (1, 2, 3, 4, 6)}
        print(f"    where both are wrong {name} equal, {same[writer > 0].mean():.0%} of all:", end="")
        for cost in (1, 4, 16):
            now = len(writer) + cost * each * asked
            times = {pending: (base + cost * own) / now for pending, (base, own) in drafts.items()}
            best = min(times, key=lambda pending: times[pending])
            print(f" at {cost}: {best} to be judged, passes {drafts[best]}, time {times[best]:.2f};", end="")
        print()


if __name__ == "__main__":
    main()
