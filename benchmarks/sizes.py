"""Validation loss of pretraining at three sizes on the same tokens: docs/sizes.md.

python benchmarks/sizes.py [--runs runs/sizes] [--epochs 0.1]
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

SIZES = ((64, 176, 2, 1), (128, 256, 4, 2), (192, 512, 4, 3))  # hidden_size, intermediate_size, layers, heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/sizes"))
    parser.add_argument("--epochs", type=float, default=0.1)
    given = parser.parse_args()
    lines = [
        "# Pretraining loss at three sizes",
        "",
        f"`python benchmarks/sizes.py --epochs {given.epochs:g}`, seed 1, {os.cpu_count()} CPU cores; "
        "text, tokenizer and schedule are the default recipe's.",
        "",
        "| parameters | tokens | tokens per parameter | validation loss, nats per token | bits per byte | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for hidden, intermediate, layers, heads in SIZES:
        runs = given.runs / str(hidden)
        dials = {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
        dials |= {"num_train_epochs": given.epochs, "runs": runs, "seed": 1, "report_to": "none"}
        command = [sys.executable, "stages/pretrain.py", *(f"--{name}={value}" for name, value in dials.items())]
        subprocess.run(command, check=True)
        run = json.loads((runs / "imdb/pretrain/run.json").read_text(encoding="utf-8"))
        m = run["metrics"]
        lines.append(
            f"| {m['parameters']:,} | {m['tokens']:,.0f} | {m['tokens_per_parameter']:.1f} "
            f"| {m['validation_loss']:.3f} | {m['bits_per_byte']:.3f} | {run['seconds']:.0f} |"
        )
    Path("docs/sizes.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
