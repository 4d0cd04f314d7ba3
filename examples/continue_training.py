"""Go on training all of a model's weights on text of your own.

    python continue_training.py OUT [MODEL] [TEXT_FILE ...]

OUT gets the data, the run and, in OUT/model, the new model. The last text is for validation. Without more it trains
the bundled model on these examples. On the command line: rodimus-mlx finetune --method full, then rodimus-mlx fuse
"""

import json
import sys
from pathlib import Path

from rodimus_mlx.convert.convert import convert

from rodimus_mlx import generate, load, load_model
from rodimus_mlx.finetune.fuse import fuse
from rodimus_mlx.finetune.report import describe
from rodimus_mlx.finetune.run import finetune
from rodimus_mlx.finetune.settings import Settings
from rodimus_mlx.hub import find_folder
from rodimus_mlx.loading import DEMO_FOLDER

SETTINGS = Settings(
    method="full",
    learning_rate=3e-4,
    schedule="cosine",
    iters=20,
    batch_size=2,
    seq_len=512,
    long="split",
    packing=True,
)


def tell(event: dict) -> None:
    """Print what the run reports."""
    for line in describe(event):
        print(line)


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    out, source = Path(sys.argv[1]), find_folder(sys.argv[2] if len(sys.argv) > 2 else DEMO_FOLDER)
    files = sys.argv[3:] or sorted(Path(__file__).parent.glob("*.py"))
    lines = [json.dumps({"text": Path(file).read_text()}) + "\n" for file in files]
    (out / "data").mkdir(parents=True)
    (out / "data" / "train.jsonl").write_text("".join(lines[:-1]))
    (out / "data" / "valid.jsonl").write_text(lines[-1])  # the weights that are best at it are kept

    is_quantized = "quantization" in load_model(source)[1]  # such weights must be written in full first
    convert(source, out / "start", dtype="float32", dequantize=is_quantized)
    finetune(out / "start", out / "data", out / "run", SETTINGS, observers=[tell])
    fuse(out / "start", out / "run", out / "model")

    for name in ("start", "model"):
        model, tokenizer = load(out / name)
        print(f"{name}: {generate(model, tokenizer, 'from rodimus_mlx', max_tokens=30)!r}")


if __name__ == "__main__":
    main()
