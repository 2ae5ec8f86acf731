"""A model's folder as the recipes want it: safetensors, the base's tokenizer, the Tulu chat template.

    python recipes/paper/adopt.py EleutherAI/llemma_7b --tokenizer meta-llama/Llama-2-7b-hf \
        --chat-template recipes/paper/tulu.jinja --out runs/paper/models/llemma_7b

Models of the Llama-2 family share its 32,000 tokens, but some append a few of their own (Llemma: 16 pieces of Code
Llama's infilling marks; Meditron: marks of chats it was never trained on), and none brings a chat template. collm
refuses Llemma, for it has another vocabulary. Here it gets the base's tokenizer, once it is certain that this writes
the same text by the same ids; its further logits are then padding, which collm leaves out of the law.

Weights are linked, not copied; pickled ones are converted shard by shard, and only tensors are unpickled.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from collm.errors import CollmError
from collm.files import write_text
from collm.models.loading import load_tokenizer
from collm.models.tokenizers import PROBES

INDEX = "model.safetensors.index.json"
CONFIGS = ("config.json", "generation_config.json")
NO_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5", "original/*")


def find(spec: str) -> Path:
    """The folder of a model on the hub, downloaded if need be; a folder is taken as it is."""
    if Path(spec).is_dir():
        return Path(spec)
    from huggingface_hub import list_repo_files, snapshot_download

    safe = any(name.endswith(".safetensors") for name in list_repo_files(spec))
    return Path(snapshot_download(spec, ignore_patterns=NO_WEIGHTS if safe else [*NO_WEIGHTS[1:], "training_args.bin"]))


def require_extension(base: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a model whose tokenizer is more than the base's with a few tokens at its end.

    Raises:
        CollmError: with the first token or text that differs.
    """
    added, theirs = base.get_added_vocab(), own.get_vocab()
    ours = {token: number for token, number in base.get_vocab().items() if token not in added}
    ours[str(base.eos_token)] = int(base.eos_token_id)  # type: ignore[arg-type]
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            raise CollmError(f"{name}: token {token!r} is {number} in the base's vocabulary, here {theirs.get(token)}")
    last = max(ours.values())
    inside = sorted((n, token) for token, n in theirs.items() if n <= last and token not in ours and token not in added)
    if inside:
        raise CollmError(f"{name}: token {inside[0][1]!r} ({inside[0][0]}) stands among the base's, not behind them")
    for probe in PROBES:
        if base.encode(probe, add_special_tokens=False) != own.encode(probe, add_special_tokens=False):
            raise CollmError(f"{name}: {probe[:40]!r} is split in another way than by the base's tokenizer")


def convert(folder: Path, out: Path) -> None:
    """Pickled shards as safetensors, one at a time.

    Raises:
        CollmError: there are no weights, or a shard holds more than tensors.
    """
    shards = sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        raise CollmError(f"{folder} holds neither safetensors nor pytorch_model*.bin")
    places: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        try:
            tensors = torch.load(shard, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # pickle's, torch's and zipfile's own kinds
            raise CollmError(f"{shard} cannot be read as plain tensors: {error}") from error
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items() if not key.endswith("inv_freq")}
        temporary = out / f".{name}"
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, out / name)
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        print(f"{shard.name} -> {name}: {len(tensors)} tensors", flush=True)
    write_text(out / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1))


def adopt(spec: str, tokenizer: str, chat_template: Path, out: Path) -> None:
    """Make the folder; `config.json` comes last, so that a folder that has one is whole."""
    folder = find(spec)
    base = load_tokenizer(tokenizer)
    if spec != tokenizer:
        require_extension(base, load_tokenizer(str(folder)), spec)
    out.mkdir(parents=True, exist_ok=True)
    base.chat_template = chat_template.read_text()
    base.save_pretrained(out)
    safe = [*sorted(folder.glob("*.safetensors")), *folder.glob(INDEX)]
    for path in safe:
        (out / path.name).unlink(missing_ok=True)
        (out / path.name).symlink_to(path.resolve())
    if not safe:
        convert(folder, out)
    for name in reversed(CONFIGS):
        if (folder / name).is_file():
            write_text(out / name, (folder / name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--tokenizer", required=True, metavar="SPEC", help="the base, whose tokenizer it gets")
    parser.add_argument("--chat-template", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    adopt(args.model, args.tokenizer, args.chat_template, args.out)
    print(f"{args.model} is in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except CollmError as error:
        sys.exit(f"Error: {error}")
