"""Train the model, measure it, and print the tables: everything behind the accuracy figures in one command.

    python tests/accuracy/run.py RESULTS.json                                         under nine minutes on one H200
    python tests/accuracy/run.py RESULTS.json --preset micro --steps 30 --device cpu  tries it on a CPU

Needs transformers beside what moe-forward needs, and on a GPU the kernel library. Text is that of the machine itself
(corpus.py). The trained model and its quantized forms lie in a temporary folder, or in --work.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from corpus import Corpus, read_corpus
from evaluate import Evaluation
from recipe import PRESETS, Recipe
from results import Results
from table import tables
from train import MINUTES, train

DEADLINE_SECONDS = 490.0


class Run:
    """Text, training and evaluation, one stage after the other. work: folder for the models."""

    def __init__(self, options: argparse.Namespace, results: Results, work: Path) -> None:
        self._options = options
        self._results = results
        self._folder = work / "model"
        self._device = torch.device(options.device)
        self._recipe: Recipe = PRESETS[options.preset]
        self._corpus: Corpus | None = None
        self._evaluation: Evaluation | None = None
        results.document["recipe"] = self._recipe.document()

    def run(self) -> None:
        """Run every stage; none of these three can fail without ending the others."""
        stages = (("text", self._read), ("train", self._train), ("load", self._load))
        if all(self._results.stage(name, stage) for name, stage in stages) and self._evaluation is not None:
            self._evaluation.measure()

    def _read(self) -> None:
        self._corpus = read_corpus(self._recipe)
        self._results.document["text"] = self._corpus.about

    def _train(self) -> None:
        if self._corpus is not None:
            self._results.document["training"] = train(
                self._folder, self._recipe, self._corpus, self._device, self._options.minutes, self._options.steps
            )

    def _load(self) -> None:
        if self._corpus is not None:
            self._evaluation = Evaluation(self._folder, self._recipe, self._corpus, self._device, self._results)


def main() -> int:
    """Parse the command line, and run. Returns: 1 where a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file to write")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of training")
    parser.add_argument("--steps", type=int, help="of training, instead of minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="folder for the models, which stay there")
    parser.add_argument("--deadline-seconds", type=float, default=DEADLINE_SECONDS, help="stages start before it only")
    parser.add_argument("--commit", help="what is measured, for the results")
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    results = Results(options.results, options.deadline_seconds, options.commit)
    with tempfile.TemporaryDirectory(prefix="moe-accuracy-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        Run(options, results, work).run()
    results.write()
    print(tables(results.document))
    return results.exit_status


if __name__ == "__main__":
    sys.exit(main())
