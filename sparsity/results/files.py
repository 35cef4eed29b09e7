"""The files of a sweep, which share a stem."""

import glob
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SweepFiles:
    """The files of a sweep, which share a stem."""

    stem: Path

    def with_suffix(self, suffix: str) -> Path:
        """The file of the sweep with this ending, dot included."""
        return self.stem.with_name(self.stem.name + suffix)

    @property
    def csv(self) -> Path:
        return self.with_suffix(".csv")

    @property
    def json(self) -> Path:
        return self.with_suffix(".json")

    @property
    def npz(self) -> Path:
        return self.with_suffix(".npz")

    @property
    def png(self) -> Path:
        return self.with_suffix(".png")

    @property
    def controls(self) -> Path:
        return self.with_suffix("_controls.csv")

    def state(self, checkpoint: str, curve: tuple[str, ...]) -> Path:
        """Where an iterative sweep keeps the network of the last level of a curve that is not done."""
        text = json.dumps([checkpoint, *curve])
        return self.with_suffix(f"_{hashlib.sha256(text.encode()).hexdigest()[:8]}_state.pth")

    def drop_states(self) -> None:
        """Remove the networks of curves that are not done."""
        for path in self.stem.parent.glob(f"{glob.escape(self.stem.name)}_{'[0-9a-f]' * 8}_state.pth"):
            path.unlink(missing_ok=True)

    @property
    def data(self) -> tuple[Path, ...]:
        """What figures are drawn from."""
        return self.csv, self.npz, self.json, self.controls


def set_aside(path: Path) -> Path:
    """What a file of a sweep is called that is being measured again, until the new one is complete."""
    return path.with_name(path.name + ".old")
