"""Read a Dockerfile into its stages, as far as the tests ask."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, its lines joined. name: in capitals. text: all behind it."""

    name: str
    text: str

    @property
    def flags(self) -> dict[str, str]:
        """What stands as --NAME=VALUE before the rest."""
        return dict(re.findall(r"(?:^|\s)--([a-z]+)=(\S+)", self.text))

    @property
    def words(self) -> list[str]:
        """The rest, by words."""
        return [word for word in self.text.split() if not word.startswith("--")]

    @property
    def listed(self) -> list[str]:
        """The exec form."""
        words: list[str] = json.loads(self.text)
        return words


@dataclass(frozen=True, slots=True)
class Stage:
    """From one FROM to the next. base: an image or the name of a stage."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        """Its instructions of that name, in order."""
        return [instruction for instruction in self.instructions if instruction.name == name]

    def last(self, name: str) -> Instruction:
        """The one that counts."""
        return self.all(name)[-1]

    @property
    def environment(self) -> dict[str, str]:
        """What ENV sets."""
        return {key: value for one in self.all("ENV") for key, value in re.findall(r"(\w+)=(\S+)", one.text)}


def read(path: Path) -> tuple[dict[str, str], dict[str, Stage]]:
    """Returns: the arguments before the first stage with their defaults, and the stages by name, in order."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            current = stages[stage] = Stage(stage, base)
        elif name and not stages:
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif name:
            current.instructions.append(Instruction(name, rest.strip()))
    return arguments, stages
