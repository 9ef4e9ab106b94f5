"""Print the accuracy figures as Markdown.

python tests/accuracy/table.py RESULTS.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formats import ACTIVATIONS, WEIGHTS

MODELS = {"trained": "The trained model", "outliers": "The same function with outlier channels"}


def tables(document: dict[str, Any]) -> str:
    """Write every row of a result file, and what failed."""
    parts = [_head(document)]
    for name, title in MODELS.items():
        model = document["models"].get(name)
        if model is not None:
            parts += [f"{title} ({_spread(model)}):", _formats(model)]
            if model["served"]:
                parts += ["Served, against the same format in the measuring process:", _served(model)]
    for failure in document["failures"]:
        last = failure["traceback"].strip().splitlines()[-1]
        parts.append(f"**Failed**: {failure['stage']}: {last}")
    return "\n\n".join(parts)


def _head(document: dict[str, Any]) -> str:
    about, text, training = document["about"], document.get("text"), document.get("training")
    said = [
        f"{about['date']}, {about['device']}, Python {about['python']}, torch {about['torch']}, "
        f"transformers {about['transformers']}, commit {about['commit']}, "
        f"{document.get('seconds', 0):.0f} s in all; `{about['command']}`."
    ]
    if text is not None:
        said.append(
            f"Text: {text['train_tokens']} bytes in {text['files_to_train_on']} files, {text['held_out_tokens']} "
            f"held out in {text['files_held_out']}, sha256 {text['sha256'][:16]}."
        )
    if training is not None:
        said.append(
            f"Training: {training['parameters']} parameters, {training['steps']} steps, {training['tokens']} tokens "
            f"in {training['seconds']:.0f} s, experts {training['experts']}."
        )
    return " ".join(said)


def _spread(model: dict[str, Any]) -> str:
    spreads = [float(spread) for spread in model["channel_spread"].values()]
    said = f"largest channel at the experts' input over the median one {min(spreads):.0f} to {max(spreads):.0f}"
    if "from_trained" in model:
        said += (
            f"; relative difference of the bf16 logits from the trained model's {model['from_trained']['logits']:.1e}"
        )
    return said


def _formats(model: dict[str, Any]) -> str:
    bf16 = model["bf16"]
    head = ("weights", "activations", "perplexity a byte", "bits a byte", "loss over bf16", "KL", "same likeliest byte")
    rows = [["bf16", "bf16", f"{bf16['perplexity']:.4f}", f"{bf16['bits_per_byte']:.4f}", *["-"] * 5]]
    for row in model["formats"]:
        errors = [
            _range([layer[name] for layer in row["layers"].values() if name in layer])
            for name in ("from_bf16", "from_float64")
        ]
        rows.append(
            [
                WEIGHTS[row["weights"]],
                ACTIVATIONS[row["activations"]],
                f"{row['perplexity']:.4f}",
                f"{row['bits_per_byte']:.4f}",
                _increase(row),
                f"{row['kl']:.2e}",
                f"{row['same_choice']:.2%}",
                *errors,
            ]
        )
    return _markdown([*head, "layer's error from bf16", "from float64, same format"], rows)


def _served(model: dict[str, Any]) -> str:
    head = ("weights", "activations", "perplexity served", "local", "loss over local", "same likeliest byte", "logits")
    rows = []
    for row in model["served"]:
        apart, texts = row["served_from_local"], row["texts_from_local"]
        rows.append(
            [
                WEIGHTS[row["weights"]],
                ACTIVATIONS[row["activations"]],
                f"{row['served']['perplexity']:.4f}",
                f"{row['local']['perplexity']:.4f}",
                _increase(apart),
                f"{apart['same_choice']:.2%}",
                f"{apart['logits']:.1e}",
                _range([layer["from_float64"] for layer in row["layers"].values()]),
                f"{texts['same']} of {texts['prompts']}",
                f"{row['tokens_per_second']:.0f}",
            ]
        )
    return _markdown([*head, "layer's error from float64", "texts the same", "tokens/s"], rows)


def _increase(row: dict[str, Any]) -> str:
    return f"{row['loss_increase']:+.5f} ± {row['loss_increase_standard_error']:.5f}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.1e} to {max(values):.1e}" if values else "-"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Parse the command line, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    print(tables(json.loads(parser.parse_args().results.read_text())))


if __name__ == "__main__":
    main()
