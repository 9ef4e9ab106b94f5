"""Coverage-guided fuzzing of one target with atheris: `python tests/fuzz/run.py TARGET [-max_total_time=60 ...]`.

Further arguments are libFuzzer's. A finding ends the run and is written to crash-* in the working directory; copy it to
tests/fuzz/found/TARGET/, where the tests try it again.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["moe_forward.wire", "moe_forward.checkpoint.index", "moe_forward.api"]):
    sys.path.insert(0, str(Path(__file__).parent))
    from targets import TARGETS, WORDS, seeds


def main() -> None:
    """Fuzz the target that the command line names, from its seeds and what was found before."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        raise SystemExit(f"expected one of {', '.join(TARGETS)}, got {name!r}")
    logging.disable(logging.CRITICAL)  # what is refused is logged, thousands of times a second
    with tempfile.TemporaryDirectory() as corpus, tempfile.NamedTemporaryFile("w") as words:
        words.writelines(f'"{_escaped(word)}"\n' for word in WORDS)
        words.flush()
        for number, seed in enumerate(seeds(name)):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        found = Path(__file__).parent / "found" / name
        folders = [corpus, *([str(found)] if found.is_dir() else [])]
        atheris.Setup([*sys.argv, f"-dict={words.name}", *folders], TARGETS[name])
        atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


if __name__ == "__main__":
    main()
