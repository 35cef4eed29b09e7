"""`--describe`: every weight is in the table, with the reason why it is not pruned, and nothing is written."""

import re
from dataclasses import replace

import torch
from conftest import SmallNet, awaken
from helpers import ROOT
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import pruning
from sparsity.networks import families
from sparsity.networks.census import census
from sparsity.networks.layers import prunable_layers
from sparsity.sweep.describe import ability_lines, layer_table, table_text

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Odd(SmallNet):
    """A network with a depthwise convolution that runs twice, attention, a parameter of its own, an idle layer."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.place = nn.Parameter(torch.zeros(1, 64, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.idle = nn.Linear(3, 3)
        self.down = weight_norm(self.down)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.depthwise(self.stem_bn(self.stem(x)).relu())).relu()
        tokens = x.flatten(2).transpose(1, 2) + self.place
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        x = self.down_bn(self.down(tokens.transpose(1, 2).reshape(x.shape))).relu()
        return self.result(self.hidden(x.mean((2, 3))).relu())


class Branching(SmallNet):
    """A network that `torch.fx` cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_every_weight_is_told_with_its_multiply_adds_and_why_it_is_not_pruned(small_net):
    table = {entry.name: entry for entry in layer_table(small_net, EXAMPLE, ["hidden"])}
    assert list(table) == ["stem", "down", "result", "hidden"]
    assert (table["down"].kind, table["down"].shape) == ("Conv2d", (8, 6, 3, 3))
    assert (table["down"].weights, table["down"].macs) == (432, 432 * 16)
    assert [entry.dense for entry in table.values()] == ["", "", "output layer", "excluded"]
    macs = census(small_net, {}, {"stem": 64, "down": 16, "result": 1, "hidden": 1}).macs
    assert sum(entry.macs for entry in table.values()) == macs


def test_odd_weights_are_in_the_table():
    model = Odd().eval()
    table = {entry.name: entry for entry in layer_table(model, EXAMPLE, [])}
    kinds = {name: entry.kind for name, entry in table.items()}
    assert (
        kinds["depthwise"] == "Conv2d, depthwise" and kinds["down"] == "Conv2d" and kinds["place"] == "parameter of Odd"
    )
    assert table["depthwise"].macs == 2 * 64 * 54
    assert table["attention.in_proj_weight"].dense == "inside MultiheadAttention"
    assert table["down"].dense.startswith("parametrized by") and table["idle"].dense == "not called as a layer"
    assert table["place"].dense == "neither convolution nor linear layer"
    assert table["result"].dense == "output layer"
    prunable = {name for name, entry in table.items() if not entry.dense}
    assert prunable == prunable_layers(model, EXAMPLE).keys()


def test_the_table_is_flush():
    lines = table_text(layer_table(SmallNet(), EXAMPLE, [])).splitlines()
    assert lines[1] == "stem    Conv2d  6x3x3x3      162         10,368  yes"
    assert lines[3] == "result  Linear  4x10          40             40  no: output layer"


def test_a_network_that_cannot_be_traced_is_told_with_the_reason(small_split):
    model = awaken(Branching())
    lines = "\n".join(ability_lines(model, layer_table(model, EXAMPLE, []), small_split))
    assert "traced by torch.fx: no (TraceError: symbolically traced" in lines and "folded: 0 of 2" in lines
    assert "refitted by reconstruction: 3 of 3 prunable layers" in lines
    assert "filters that can be removed: 0, in 0 convolutions" in lines


def test_what_can_be_done_is_counted(small_net, small_split):
    lines = list(ability_lines(small_net, layer_table(small_net, EXAMPLE, []), small_split))
    assert lines[0] == "prunable: 674 of 764 parameters, in 3 of 4 layers"
    assert lines[1] == "dense besides: 28 of BatchNorm2d, 8 of Conv2d.bias, 14 of Linear.bias"
    assert lines[2] == "traced by torch.fx: yes"
    told = r"logits of up to (\S+) differ by at most (\S+), all predictions are the same"
    found = re.fullmatch(f"folded: 2 of 2 BatchNorm; on 32 test images {told}", lines[3])
    largest, difference = map(float, found.groups())
    assert 0 <= difference < 1e-5 < largest
    assert lines[4:] == [
        "refitted by reconstruction: 3 of 3 prunable layers",
        "filters that can be removed: 6, in 1 convolutions",
        "with --couple: 24 channels can be removed, in 3 groups",
    ]


def test_layers_that_are_not_refitted_are_named(small_split):
    model = awaken(Odd())
    nn.utils.parametrize.remove_parametrizations(model.down, "weight")
    told = list(ability_lines(model, layer_table(model, EXAMPLE, []), small_split))[-3]
    assert told == (
        "refitted by reconstruction: 3 of 5 prunable layers; not depthwise: runs 2 times; "
        "not attention.out_proj: inside MultiheadAttention"
    )


def test_the_script_describes_and_writes_nothing(tmp_path, monkeypatch, tiny_checkpoint, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--describe", "--checkpoint", str(tiny_checkpoint), "--threads", "1", "--levels", "0,50"]
    assert pruning.main([*flags, "--recover", "none", "batchnorm", "finetune", "--exclude", "conv1"]) == 0
    out = capsys.readouterr().out
    assert "conv1                Conv2d  4x3x3x3        108          6,912  no: excluded" in out
    assert "traced by torch.fx: yes" in out and "in 19 of 21 layers" in out
    assert "folded: 20 of 20 BatchNorm" in out and "filters that can be removed: 120, in 8 convolutions" in out
    told = out.splitlines()[-1]
    assert "a sweep of these flags: about 0:00:" in told and "7 networks x 24 images" in told
    assert "2,048 calibration images" in told and told.endswith("no time for training")
    assert not list(tmp_path.iterdir())


def test_the_networks_of_others_are_described(small_split):
    split = replace(small_split, images=torch.zeros(50, 3, 32, 32, dtype=torch.uint8))
    for name, norms, layers in (("akamaster", 19, 20), ("chita", 21, 22)):
        model = families.build(families.describe(f"{ROOT}/tests/networks/published.py:{name}", 10, 0, {})).eval()
        table = layer_table(model, torch.zeros(1, 3, 32, 32), [])
        lines = "\n".join(ability_lines(model, table, split))
        assert f"in {layers - 1} of {layers} layers" in lines and f"folded: {norms} of {norms} BatchNorm" in lines
        assert f"refitted by reconstruction: {layers - 1} of {layers - 1} prunable layers" in lines
        assert "filters that can be removed: 336, in 9 convolutions" in lines
