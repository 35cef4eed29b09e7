"""The networks have the names, shapes and results that other repositories' files rely on."""

import pytest
import torch
import torch.nn.functional as F

import Build_Resnet

# Counts of kuangliu's CIFAR networks of the same names.
PARAMETERS = {
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "resnet101": 42_512_970,
    "resnet152": 58_156_618,
}


def test_resnet50_names_and_shapes_are_those_of_the_reference():
    with torch.device("meta"):
        state = Build_Resnet.Resnet50Model().state_dict()
    shapes = {
        "conv1.weight": (64, 3, 3, 3),
        "layer1.0.shortcut.0.weight": (256, 64, 1, 1),
        "layer1.0.shortcut.1.num_batches_tracked": (),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "linear.weight": (10, 2048),
        "linear.bias": (10,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert len(state) == 320
    stems = {name.split(".")[0] for name in state}
    assert stems == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "linear"}


@pytest.mark.parametrize("arch", Build_Resnet.ARCHITECTURES)
def test_depths_have_their_counts_and_their_description_is_read_off_the_shapes(arch):
    spec = {"arch": arch, "num_classes": 7, "width": 8}
    with torch.device("meta"):
        model, other = getattr(Build_Resnet, arch)(), Build_Resnet.build(spec)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[arch]
    assert Build_Resnet.spec_of(other.state_dict()) == spec


def test_pooling_is_bit_for_bit_that_of_the_reference_at_32_pixels():
    torch.manual_seed(0)
    model = Build_Resnet.resnet18(width=8).eval()
    seen = []
    model.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        logits = model(torch.randn(3, 3, 32, 32))
        expected = model.linear(F.avg_pool2d(seen[0], 4).view(3, -1))
    assert seen[0].shape[-2:] == (4, 4)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("size", [4, 17, 64])
def test_other_image_sizes_work(size):
    logits = Build_Resnet.resnet18(num_classes=7, width=4).eval()(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7) and logits.isfinite().all()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_blocks_whose_last_norms_are_zero_are_their_shortcuts(arch):
    model = Build_Resnet.build({"arch": arch, "num_classes": 3, "width": 4})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Build_Resnet.zero_last_norms(model)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == sum(Build_Resnet.ARCHITECTURES[arch][1])
    block = model.eval().layer1[-1]
    inputs = torch.rand(2, block.expansion * 4, 8, 8)
    assert torch.equal(block(inputs), inputs)


@pytest.mark.parametrize(
    "wrong", [{"arch": "vgg"}, {"arch": None}, {"num_classes": 0}, {"num_classes": "10"}, {"width": True}]
)
def test_a_wrong_description_is_refused(wrong):
    with pytest.raises(ValueError, match=r"architecture|whole number"):
        Build_Resnet.build({"arch": "resnet18", "num_classes": 10, "width": 64} | wrong)


def test_a_foreign_state_dict_has_no_description():
    with pytest.raises(ValueError, match="not a ResNet"):
        Build_Resnet.spec_of({"fc.weight": torch.zeros(1, 1)})
    state = Build_Resnet.resnet18(width=1).state_dict() | {"layer1.2.conv1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="none of the known"):
        Build_Resnet.spec_of(state)
