"""Where an iterative sweep stands: the network after its last level, kept on disk until the sweep is done."""

from pathlib import Path

from torch import nn

from sparsity.networks.checkpoint import load, plain_state, save
from sparsity.system.errors import UserError


def save_state(path: Path, key: str, sweep: str, network: nn.Module) -> None:
    """Keep `network`, which is plain, as that of the row `key` of the sweep with the fingerprint `sweep`."""
    save(path, {"net": plain_state(network), "row": key, "sweep": sweep})


def load_state(path: Path, keys: list[str], sweep: str, network: nn.Module) -> int:
    """How many of the rows `keys` are behind the network on disk, which is loaded into `network` in place.

    0, and `network` as it was, where there is no such file or it is that of another curve or sweep: the curve is then
    pruned again from its first level.
    """
    if not path.exists():
        return 0
    saved = load(path)
    row = saved.content.get("row")
    if row not in keys or saved.content.get("sweep") != sweep:
        return 0
    try:
        network.load_state_dict(saved.net)
    except RuntimeError as error:
        raise UserError(f"{path} is damaged; remove it, and the curve starts from its first level") from error
    return keys.index(row) + 1
