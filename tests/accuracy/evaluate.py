"""Measure what quantization does to a trained model: to its text, to its layers, and through the service.

    python tests/accuracy/evaluate.py DIR RESULTS.json

DIR is what train.py saved; quantized forms are written beside it. Two models are measured: the trained one, and the
same function with outlier channels at the experts' input (outliers.py). Of each: bf16; every format of formats.py,
computed in this process; some as `moe-forward serve` computes them. A stage that fails is noted in the results with its
traceback, the others go on, and the exit status is 1. `table.py RESULTS.json` prints the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from corpus import Corpus, evenly, read_corpus
from formats import INT4, Format, formats
from measure import difference
from model import load_model
from outliers import with_outliers
from recipe import PRESETS, Recipe
from results import Results
from subject import Subject
from train import TRAINING_FILE

DEADLINE_SECONDS = 270.0
SERVED = {
    "trained": (Format("search", "token"), Format("search", "token_group")),
    "outliers": (Format("calibrated", "token"),),
}


class Evaluation:
    """Makes and measures the two models. folder: the trained one. results: take the figures."""

    def __init__(self, folder: Path, recipe: Recipe, corpus: Corpus, device: torch.device, results: Results) -> None:
        training = json.loads((folder / TRAINING_FILE).read_text())
        torch.set_float32_matmul_precision("highest")  # TF32 would round what the formats say is exact
        self._folder = folder
        self._recipe = recipe
        self._results = results
        self._held_out = evenly(corpus.held_out, recipe.evaluated_windows, recipe.window_tokens).to(device)
        self._calibrating = evenly(corpus.train, recipe.calibration_windows, recipe.window_tokens).to(device)
        self._trained = load_model(folder, device, training["training"]["experts"])
        self._subjects: dict[str, Subject] = {}

    def measure(self) -> None:
        """Run every stage."""
        for name, add in (("trained", self._add_trained), ("outliers", self._add_outliers)):
            if not self._results.stage(f"{name}: bf16", add):
                continue
            subject = self._subjects[name]
            for scales in INT4:
                self._results.stage(f"{name}: quantize {scales}", partial(subject.quantize, scales))
            for chosen in formats():
                self._results.stage(f"{name}: {chosen.name}", partial(subject.measure, chosen))
            for chosen in SERVED[name]:
                self._results.stage(f"{name}: served {chosen.name}", partial(subject.measure_served, chosen))

    def _add_trained(self) -> None:
        self._add("trained", Subject(self._trained, self._folder, self._recipe, self._held_out, self._calibrating))

    def _add_outliers(self) -> None:
        model = with_outliers(self._trained, self._recipe)
        folder = self._folder.with_name(f"{self._folder.name}-outliers")
        model.save_pretrained(folder)
        subject = Subject(model, folder, self._recipe, self._held_out, self._calibrating)
        if "trained" in self._subjects:
            subject.document["from_trained"] = difference(subject.bf16, self._subjects["trained"].bf16)
        self._add("outliers", subject)

    def _add(self, name: str, subject: Subject) -> None:
        self._subjects[name] = subject
        self._results.document["models"][name] = subject.document


def main() -> int:
    """Parse the command line, and measure. Returns: 1 where a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what train.py saved")
    parser.add_argument("results", type=Path, help="JSON file to write")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--deadline-seconds", type=float, default=DEADLINE_SECONDS, help="stages start before it only")
    parser.add_argument("--commit", help="what is measured, for the results")
    options = parser.parse_args()
    recipe = PRESETS[options.preset]
    results = Results(options.results, options.deadline_seconds, options.commit)
    corpus = read_corpus(recipe)
    training = json.loads((options.folder / TRAINING_FILE).read_text())
    if training["recipe"] != json.loads(json.dumps(recipe.document())) or training["text"] != corpus.about:
        raise SystemExit(f"{options.folder} was trained by another recipe or on other text than this machine has")
    results.document |= {"recipe": training["recipe"], "text": training["text"], "training": training["training"]}
    Evaluation(options.folder, recipe, corpus, torch.device(options.device), results).measure()
    return results.exit_status


if __name__ == "__main__":
    sys.exit(main())
