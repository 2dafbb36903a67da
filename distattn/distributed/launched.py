"""What `distattn launch` tells a rank, in the variables of its environment."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

PREFIX = "DISTATTN_"


@dataclasses.dataclass(frozen=True)
class Launched:
    """A rank's place in its job."""

    coordinator_address: str  # host:port, of rank 0
    num_processes: int
    process_id: int
    cpu_devices: int  # of each process
    roll_call: str  # a directory, in which each rank that comes to `initialize` says so

    def variables(self) -> dict[str, str]:
        """The variables that `read` understands."""
        fields = dataclasses.asdict(self)
        return {f"{PREFIX}{name.upper()}": str(value) for name, value in fields.items()}

    def answer(self, facts: dict[str, str]) -> dict[int, dict[str, str]]:
        """Leaves this rank's facts in the roll call; returns those of all that have come so far."""
        directory = Path(self.roll_call)
        unfinished = directory / f"{self.process_id}.unfinished"
        unfinished.write_text(json.dumps(facts), encoding="utf-8")
        unfinished.rename(directory / str(self.process_id))
        present = (path for path in directory.iterdir() if path.name.isdecimal())
        return {int(path.name): json.loads(path.read_text(encoding="utf-8")) for path in present}

    def absent(self) -> list[int]:
        """The ranks that have not come to `initialize` yet."""
        there = {path.name for path in Path(self.roll_call).iterdir()}
        return [rank for rank in range(self.num_processes) if str(rank) not in there]


NAMES = frozenset(f"{PREFIX}{field.name.upper()}" for field in dataclasses.fields(Launched))


def read(environment: Mapping[str, str]) -> Launched | None:
    """What the launcher has set, or None where there is no launcher.

    Raises:
      ValueError: some of the variables and not the others, or no numbers in them.
    """
    fields = {f.name: int if f.type is int else str for f in dataclasses.fields(Launched)}
    given = {name: environment.get(f"{PREFIX}{name.upper()}") for name in fields}
    absent = [f"{PREFIX}{name.upper()}" for name, text in given.items() if text is None]
    if len(absent) == len(fields):
        return None
    remedy = "they are set by `distattn launch`: leave all of them to it, or unset all of them"
    if absent:
        raise ValueError(f"the environment lacks {', '.join(absent)}; {remedy}")
    try:
        return Launched(**{name: kind(given[name]) for name, kind in fields.items()})
    except ValueError as error:
        raise ValueError(f"the variables {PREFIX}* of the environment: {error}; {remedy}") from None
