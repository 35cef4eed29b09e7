"""Seeds, precision and compiling are chosen as promised."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from sparsity.system import machine
from sparsity.system.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_seeds_of_neighbours_are_unrelated_and_repeatable():
    draws = {keys: torch.rand(4, generator=machine.generator(*keys)) for keys in [(0, 1), (1, 0), (0, 2), (0,)]}
    assert torch.equal(draws[0, 1], torch.rand(4, generator=machine.generator(0, 1)))
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 4


def test_precision_is_chosen_by_the_hardware():
    assert machine.resolve_precision("fp32", CPU) == "fp32"
    assert machine.resolve_precision("bf16", CPU) == "bf16"
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    expected = "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
    assert machine.resolve_precision("auto", CPU) == expected


def test_compiling_is_for_cuda_and_not_for_equal_bits():
    choices = [machine.resolve_compile("auto", device, exact) for device in (CPU, CUDA) for exact in (False, True)]
    assert choices == ["off", "off", "on", "off"]
    assert machine.resolve_compile("on", CPU) == "on"
    with pytest.raises(UserError, match="leave it or --deterministic out"):
        machine.resolve_compile("on", CPU, deterministic=True)


def test_a_device_that_is_not_here_is_told():
    with pytest.raises(UserError, match="--device cuda:99 cannot be used here"):
        machine.resolve_device("cuda:99")


FAULTS = """
import resource
import torch
from sparsity.system.machine import keep_memory, release_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 23)  # 32 MB: 8,192 pages of 4 kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = min(faults_of_a_step() for _ in range(12))
keep_memory()
kept = min(faults_of_a_step() for _ in range(12))
release_memory()
print(default, kept, faults_of_a_step())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library gives memory back in its own way")
def test_freed_memory_is_kept_until_it_is_released():
    said = subprocess.check_output([sys.executable, "-c", FAULTS], cwd=ROOT, text=True)
    default, kept, released = map(int, said.split())
    assert kept == 0 < default and released > 0  # the pages of the step before are used again
