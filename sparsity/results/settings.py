"""When two sweeps are one experiment: rows of other settings, data, layers or checkpoints are never mixed."""

from pathlib import Path
from typing import Any

from sparsity.system.errors import UserError
from sparsity.system.methods import Curve

# Settings that are None in a sweep without use for them.
WHERE_USED = ("calibration_images", "calibration_augmentation", "distill", "finetune", "engine")


def require_header(header: Any) -> None:
    """Raise an exception unless the content of a sweep's JSON has the parts that are used later."""
    kinds = [(dict, header["settings"]), (list, header["data"]["classes"]), (list, header.get("curves", []))]
    kinds += [(str, entry["sha256"]) for entry in header["checkpoints"].values()]
    kinds += [(float, entry["accuracy"]) for entry in header["dense"].values()]
    if not all(isinstance(value, kind) for kind, value in kinds):
        raise ValueError("a setting, class, hash or accuracy is missing")


def curve_rank(header: dict[str, Any], curve: Curve) -> tuple[int, Curve]:
    """Where a curve stands: in the order of `header['curves']`, after it those that it does not name, by alphabet."""
    known = header.get("curves", [])
    return known.index(list(curve)) if list(curve) in known else len(known), curve


def recorded_names(there: dict[str, dict], now: dict[str, dict]) -> dict[str, dict]:
    """The checkpoints of now, each under the name that its rows are recorded with: the hash tells which is which."""
    recorded = {entry["sha256"]: name for name, entry in there.items()}
    hashes = {entry["sha256"] for entry in now.values()}
    names = {}
    for name, entry in now.items():
        # The name may belong to rows of another file that is swept as well, under a new name.
        taken = name in there and there[name]["sha256"] in hashes - {entry["sha256"]}
        fresh = f"{name} ({entry['sha256'][:8]})" if taken else name
        names[recorded.get(entry["sha256"], fresh)] = entry
    return names


def require_same(table: Path, there: dict[str, Any], now: dict[str, Any], layers: tuple[dict, dict]) -> None:
    """Raise UserError unless settings, data and layers (there, now) are the same and no checkpoint was replaced.

    More checkpoints may be added. Settings of WHERE_USED that only one side has are taken over into `now`. The error
    names `table` and everything that differs. Another machine of the same kind is said.
    """
    differing = []
    for part in ("settings", "data"):
        for key in sorted(there[part].keys() | now[part].keys()):
            old, new = there[part].get(key), now[part].get(key)
            if part == "settings" and key in WHERE_USED and None in (old, new):
                now[part][key] = old if new is None else new  # rows without and rows with it do not clash
            elif old != new:
                differing.append(f"{key} ({_short(old)} there, {_short(new)} now)")
    if layers[0] != layers[1]:
        # With other layers, or other numbers of weights in them, sparsity is a share of something else.
        changed = ", ".join(sorted({name for name, _ in layers[0].items() ^ layers[1].items()}))
        differing.append(f"prunable layers or their sizes ({_short(changed)})")
    for name, entry in there["checkpoints"].items():
        if name not in now["checkpoints"]:
            differing.append(f"checkpoint ({name} there, {', '.join(now['checkpoints'])} now)")
        elif entry["sha256"] != now["checkpoints"][name]["sha256"]:
            differing.append(f"checkpoint ({name} has changed since)")
    if differing:
        raise UserError(
            f"{table} holds rows of another run: {'; '.join(differing)}. Replace all of them with --restart, or "
            "keep both with another --name"
        )
    machines = [header.get("machine", {}).get("device") for header in (there, now)]
    if machines[0] != machines[1]:
        print(f"the rows of {table} come from {machines[0]}, new ones from {machines[1]}: last digits may differ")


def _short(value: Any) -> str:
    """A setting in a few words."""
    if value is None:
        return "not set"
    text = ("on" if value else "off") if isinstance(value, bool) else str(value)
    return text if len(text) <= 24 else text[:12] + "..."
