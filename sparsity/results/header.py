"""The JSON of a sweep: what it must hold, and when two of them tell the same experiment."""

import math
from pathlib import Path
from typing import Any

from sparsity.results.rows import Curve
from sparsity.system.errors import UserError

WAYS_OUT = "measure again with --restart, or choose another --name"


WHERE_USED = ("calibration_images", "finetune", "engine")  # settings that are None in a sweep without use for them


def checked_header(header: Any) -> dict[str, Any]:
    """The content of a sweep's JSON, if its parts are what they should be; otherwise ValueError."""
    parts = ("settings", "data", "checkpoints", "dense")
    if not isinstance(header, dict) or not all(isinstance(header.get(part), dict) for part in parts):
        raise ValueError(f"one of {', '.join(parts)} is missing")
    entries = [*header["checkpoints"].values(), *header["dense"].values()]
    if not all(isinstance(entry, dict) for entry in entries) or not isinstance(header["data"].get("classes"), list):
        raise ValueError("an entry is not what it should be")
    if not all(isinstance(entry.get("sha256"), str) for entry in header["checkpoints"].values()):
        raise ValueError("a checkpoint has no hash")
    if not all(math.isfinite(figures["accuracy"]) for figures in header["dense"].values()):
        raise ValueError("an accuracy is not a number")
    curves = header.get("curves", [])
    if not isinstance(curves, list) or not all(map(_is_curve, curves)):
        raise ValueError("its curves are not lists of criterion, allocation and recovery")
    return header


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(word, str) for word in value)


def curve_rank(header: dict[str, Any], curve: Curve) -> tuple[int, Curve]:
    """Where a curve stands: in the order of `header['curves']`, after it those that it does not name, by alphabet."""
    known = header.get("curves", [])
    return known.index(list(curve)) if list(curve) in known else len(known), curve


def joined_curves(there: dict[str, Any], now: dict[str, Any]) -> list[list[str]]:
    """The curves of a sweep that is gone on with: those there in their order, then the new ones."""
    known, wanted = there.get("curves", []), now.get("curves", [])
    return known + [curve for curve in wanted if curve not in known]


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
    """Same settings, data and layers (there, now), and every checkpoint there is among those of now.

    More checkpoints may be added, none replaced. Settings of WHERE_USED that only one side has are taken over into
    `now`. Raises UserError that names `table` and everything that differs.
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
        changed = [name for name in {**layers[0], **layers[1]} if layers[0].get(name) != layers[1].get(name)]
        differing.append(
            f"prunable layers ({len(layers[0])} there, {len(layers[1])} now; {_short(', '.join(changed))})"
        )
    for name, entry in there["checkpoints"].items():
        if name not in now["checkpoints"]:
            differing.append(f"checkpoint ({name} there, {', '.join(now['checkpoints'])} now)")
        elif entry["sha256"] != now["checkpoints"][name]["sha256"]:
            differing.append(f"checkpoint ({name} has changed since)")
    if differing:
        raise UserError(
            f"{table} holds rows of another run: {'; '.join(differing)}. Measure everything again with --restart, "
            "or keep both with another --name"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
