"""Coupled channels: which channels of a network have to go together, and which stay."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsity.networks.layers import Layer, way_of
from sparsity.prune.channel_graph import ChannelGraph


@dataclass(frozen=True)
class Coupling:
    """The channels of a network that can be removed, in units that go together, numbered from 0.

    `outputs` maps convolutions, linear layers and BatchNorm to the unit of each of their output channels, `inputs`
    ungrouped convolutions and linear layers to the unit of each of their inputs; -1 stands for a channel that stays. A
    grouped convolution loses its inputs with its filters. `groups` lists the units that the same layers make, by the
    names of these, and `kept` why (other) channels of a layer stay.
    """

    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]
    groups: dict[str, Tensor]
    kept: dict[str, str]

    @property
    def units(self) -> int:
        return sum(map(len, self.groups.values()))

    def channels(self, units: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Name -> which output channels, and which inputs, of a layer belong to `units`, a bool for each unit.

        Inputs are None where a layer has none of its own. Layers without any of these channels are left out.
        """
        units = torch.cat([units, units.new_zeros(1)])  # where -1 points to
        reading = {name: units[numbers] for name, numbers in self.inputs.items()}
        found = {name: (units[numbers], reading.get(name)) for name, numbers in self.outputs.items()}
        return {name: pair for name, pair in found.items() if any(part is not None and part.any() for part in pair)}


def couple(model: nn.Module, layers: Collection[str] | None = None) -> Coupling:
    """The coupled channels of a traced network; of others none. Only those that `layers` alone make, where given."""
    if not way_of(model).traced:
        return Coupling({}, {}, {}, {})
    graph = ChannelGraph(model)
    made = {name: each for name, each in graph.outputs.items() if isinstance(model.get_submodule(name), Layer)}
    left_out = [(numbers, f"{name} is not pruned") for name, numbers in made.items() if name not in (layers or made)]
    staying: dict[int, str] = {}
    for numbers, reason in (*graph.staying, *left_out):
        for number in numbers:
            staying.setdefault(graph.root(number), reason)
    makers: dict[int, dict[str, None]] = {}  # root -> the layers that make its channels
    for name, numbers in made.items():
        for number in numbers:
            makers.setdefault(graph.root(number), {})[name] = None
    units, groups, kept = dict.fromkeys(staying, -1), {}, {}
    for root, names in makers.items():
        if root in staying:
            kept = dict.fromkeys(names, staying[root]) | kept
        else:
            units[root] = len(units) - len(staying)
            groups.setdefault(" ".join(names), []).append(units[root])

    def numbered(sides: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: torch.tensor([units[graph.root(number)] for number in side]) for name, side in sides.items()}

    found = {name: torch.tensor(numbers) for name, numbers in groups.items()}
    return Coupling(numbered(graph.outputs), numbered(graph.inputs), found, kept)
