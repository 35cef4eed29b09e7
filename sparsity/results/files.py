"""The files of a sweep: names, parts of several processes, files set aside at a restart."""

import glob
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from sparsity.system.methods import Curve


@dataclass(frozen=True)
class SweepFiles:
    """The files of a sweep, which share a stem; of several processes, each but the first has a `part` of its own."""

    stem: Path
    part: int = 0

    def with_suffix(self, suffix: str) -> Path:
        """The file with this ending, dot included."""
        return self.stem.with_name(self.stem.name + f"_part{self.part}" * (self.part > 0) + suffix)

    csv = property(lambda self: self.with_suffix(".csv"))
    json = property(lambda self: self.with_suffix(".json"))
    npz = property(lambda self: self.with_suffix(".npz"))
    png = property(lambda self: self.with_suffix(".png"))
    controls = property(lambda self: self.with_suffix("_controls.csv"))
    # Figures are drawn from these.
    data = property(lambda self: (self.csv, self.npz, self.json, self.controls))

    def state(self, checkpoint: str, curve: Curve) -> Path:
        """The network of the last level of an unfinished iterative curve, the same whichever process works on it."""
        digest = hashlib.sha256(json.dumps([checkpoint, *curve]).encode()).hexdigest()
        return replace(self, part=0).with_suffix(f"_{digest[:8]}_state.pth")

    def drop_states(self) -> None:
        """Remove the networks of unfinished curves."""
        self._remove(f"_{'[0-9a-f]' * 8}_state.pth")

    def parts(self) -> list["SweepFiles"]:
        """The parts that hold rows which have not been joined."""
        numbers = [path.stem.rpartition("_part")[2] for path in self._glob("_part[0-9]*.csv")]
        return [replace(self, part=int(number)) for number in numbers if number.isdecimal()]

    def drop_parts(self) -> None:
        """Remove the files of all parts."""
        for suffix in (".csv", ".npz", ".json"):
            self._remove(f"_part[0-9]*{suffix}")

    def _glob(self, pattern: str) -> list[Path]:
        return sorted(self.stem.parent.glob(glob.escape(self.stem.name) + pattern))

    def _remove(self, pattern: str) -> None:
        for path in self._glob(pattern):
            path.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Rename the data files to `.old` until the new ones are complete; those of an earlier, complete sweep stay."""
        complete = self.csv.exists() or _old(self.csv).exists()
        for path in self.data:
            if complete and path.exists() and not _old(path).exists():
                path.replace(_old(path))
            path.unlink(missing_ok=True)

    def drop_old(self) -> None:
        """Remove the files that were set aside; the new ones are complete."""
        for path in self.data:
            _old(path).unlink(missing_ok=True)


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")
