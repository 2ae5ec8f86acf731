"""Training and evaluation rows: JSONL files and Hugging Face datasets, checked row by row."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collm.data.messages import EXPECTED, Conversation, read_messages, read_tools, require_texts
from collm.data.records import rows, unpadded
from collm.errors import CollmError
from collm.text import require_text
from collm.types import Message

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Example:
    """One row: a conversation (`messages`) or a plain text (`prompt`, and `completion` where there is one).

    `fields` holds every other column, such as the reference "answer" of an evaluation task. `where` names file and
    line for error messages and takes no part in comparisons. `tools`: function schemas that the conversation offers.
    `last_turn`: of its assistant turns only the last one is learnt.
    """

    id: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    tools: tuple[Mapping[str, Any], ...] = ()
    last_turn: bool = False

    @property
    def question(self) -> Conversation | str:
        """What a model is asked: the conversation up to its last assistant turn, or the prompt."""
        if self.messages is None:
            return self.prompt or ""
        roles = [message["role"] for message in self.messages]
        end = len(roles) - 1 - roles[::-1].index("assistant") if "assistant" in roles else len(roles)
        return Conversation(self.messages[:end], self.tools)

    @property
    def reference(self) -> str | None:
        """The text of the last assistant turn, or the completion; None for a row that is a question only."""
        if self.messages is None:
            return self.completion
        turns = [message["content"] for message in self.messages if message["role"] == "assistant"]
        return turns[-1] if turns else None

    @property
    def label(self) -> str:
        """How error messages name this example."""
        return self.where or f"example {self.id!r}"


def parse_example(row: object, where: str, default_id: str, *, last_turn: bool = False) -> Example:
    """Check one row.

    Args:
        last_turn: of a conversation's assistant turns only the last one is to be learnt.

    Raises:
        CollmError: naming `where`, what is wrong and what was expected.
    """
    if not isinstance(row, Mapping):
        raise CollmError(f"{where}: a row is a JSON object, not {type(row).__name__}; {EXPECTED}")
    rest = {key: value for key, value in row.items() if key not in ("id", "messages", "prompt", "completion", "tools")}
    # Arrow tables have every column in every row: None is a column that this row does not use.
    messages, prompt, completion = (row.get(key) for key in ("messages", "prompt", "completion"))
    number = row.get("id")
    name = default_id if number is None else str(number)
    require_texts([name, rest], where)  # what is read is written again: into traces, results, prepared files
    if messages is not None:
        if prompt is not None or completion is not None:
            raise CollmError(f"{where}: a row has either messages or prompt and completion, not both; {EXPECTED}")
        tools = read_tools(row.get("tools"), where)
        turns = read_messages(messages, where)
        return Example(name, messages=turns, fields=rest, where=where, tools=tools, last_turn=last_turn)
    if prompt is None:
        raise CollmError(f"{where}: neither messages nor prompt; {EXPECTED}")
    for key, value in (("prompt", prompt), ("completion", completion)):
        if value is not None and not isinstance(value, str):
            raise CollmError(f"{where}: {key} is a string, not {type(value).__name__}; {EXPECTED}")
        require_text(value or "", f"{where}: {key}")
    if row.get("tools") is not None:
        rest["tools"] = row["tools"]
    return Example(name, prompt=prompt, completion=completion, fields=rest, where=where)


def load_examples(
    source: str | Path, *, split: str = "train", skip_bad: bool = False, last_turn: bool = False
) -> list[Example]:
    """Read rows of a JSONL file, or of a Hugging Face dataset: a saved folder, a parquet file or folder, a hub id.

    Args:
        split: which split of a dataset that has several; JSONL files have none.
        skip_bad: leave out bad rows and log how many, instead of raising at the first.
        last_turn: of conversations only the last assistant turn is to be learnt.

    Raises:
        CollmError: naming file and line of a bad row and what was expected; or no rows at all.
    """
    path = Path(source)
    if path.suffix in JSON_SUFFIXES:
        found: Iterable[tuple[str, object]] = rows(path)
    else:
        found = _dataset_rows(str(source), split)
    examples: list[Example] = []
    first_seen: dict[str, str] = {}
    bad = 0
    for where, row in found:
        try:
            if isinstance(row, CollmError):
                raise CollmError(f"{row}; {EXPECTED} on a line of its own") from row
            example = parse_example(row, where, default_id=where.rpartition(" ")[2], last_turn=last_turn)
            if example.id in first_seen:
                raise CollmError(
                    f"{where}: id {example.id!r} was used before ({first_seen[example.id]}); ids must be unique"
                )
        except CollmError as error:
            if not skip_bad:
                raise
            bad += 1
            logger.warning("skipped: %s", error)
        else:
            first_seen[example.id] = where
            examples.append(example)
    if bad:
        logger.warning("%s: skipped %d bad rows of %d", source, bad, bad + len(examples))
    if not examples:
        raise CollmError(f"{source}: there are no {'good ' if bad else ''}rows; {EXPECTED}, one a line")
    return examples


def _dataset_rows(source: str, split: str) -> Iterator[tuple[str, object]]:
    import datasets

    path = Path(source)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data: Any = datasets.load_from_disk(source)
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise CollmError(f"{source}: there is no split {split!r}; it has {', '.join(data)}")
                data = data[split]
        elif path.suffix == ".parquet":
            data = datasets.load_dataset("parquet", data_files=source, split="train")
        elif path.exists() and not path.is_dir():
            raise CollmError(f"{source}: data is a {', '.join(JSON_SUFFIXES)} or .parquet file, or a dataset's folder")
        elif not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
            raise CollmError(f"{source}: there is no such file or folder")
        else:
            data = datasets.load_dataset(source, split=split)
        schema = data.features.arrow_schema
        for number, row in enumerate(data):
            yield f"{source}, row {number}", unpadded(row, schema)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, CollmError):
            raise
        said = " ".join(str(error).split())
        raise CollmError(f"{source}: could not be loaded as a dataset (is the path right?): {said}") from error


def examples_fingerprint(examples: Iterable[Example]) -> str:
    """A hash of what models read and write: ids and texts, not the other fields, and in this order.

    That of a single example tells whether a row of scores belongs to it, or to an older text under the same id.
    """
    digest = hashlib.sha256()
    for example in examples:
        texts: list[Any] = [example.id, example.messages, example.prompt, example.completion]
        # What is not there leaves the hash as it was before it could be.
        texts += [example.tools] if example.tools else []
        texts += ["last turn"] if example.last_turn else []
        digest.update(json.dumps(texts, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def hold_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """The examples to learn from, and those held out: a hash of each id decides, so that adding examples moves none
    from one side to the other; of few, one at least is on either side.

    Raises:
        CollmError: there are fewer than two.
    """
    if len(examples) < 2:
        raise CollmError("a single example cannot be both learnt and held out: give more, or a validation file")
    places = [zlib.crc32(example.id.encode()) / 2**32 for example in examples]
    # The lowest place is held out in any case, the highest never.
    border = min(max(share, min(places) + 2**-32), max(places))
    rest = [example for example, place in zip(examples, places, strict=True) if place >= border]
    return rest, [example for example, place in zip(examples, places, strict=True) if place < border]
