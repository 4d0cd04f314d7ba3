"""Convert a checkpoint, quantize it to 8, 4 and 2 bits, and see what that costs on a text.

    python convert_and_quantize.py OUT [MODEL] [TEXT]

MODEL is a folder or a Hugging Face id, TEXT a file; without them it is the bundled model, and this script. The same on
the command line: rodimus-mlx convert MODEL OUT, quantize OUT OUT-4bit --bits 4, perplexity OUT-4bit --data TEXT
"""

import sys
from pathlib import Path

from rodimus_mlx.convert.convert import Summary, convert
from rodimus_mlx.convert.schemes import make_scheme

from rodimus_mlx import load, load_model
from rodimus_mlx.evaluation.perplexity import perplexity
from rodimus_mlx.evaluation.text import read_documents
from rodimus_mlx.hub import find_folder
from rodimus_mlx.loading import DEMO_FOLDER


def show(name: str, summary: Summary, text: str) -> None:
    """One line on what a conversion made."""
    model, tokenizer = load(summary.out)
    found = perplexity(model, read_documents(text, tokenizer, max_tokens=20_000), window=1024)
    size = f"{summary.weight_bytes / 1e6:6.1f} MB, {summary.bits_per_weight:5.2f} bits a weight"
    print(f"{name:>6}: {size}, perplexity {found['perplexity']:.3f}")


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    out = Path(sys.argv[1])
    source = find_folder(sys.argv[2] if len(sys.argv) > 2 else DEMO_FOLDER)  # downloads what is not here
    text = sys.argv[3] if len(sys.argv) > 3 else __file__

    is_quantized = "quantization" in load_model(source)[1]  # rounding twice would cost more
    full = convert(source, out / "full", dequantize=is_quantized)
    show("full", full, text)
    for bits in (8, 4, 2):
        summary = convert(full.out, out / f"{bits}bit", scheme=make_scheme(bits))
        show(f"{bits} bits", summary, text)


if __name__ == "__main__":
    main()
