"""Device, precision, threads and seeds; files written whole or not at all; errors told in one line."""

import argparse
import ctypes
import hashlib
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsity.system.errors import UserError, one_line
from sparsity.system.processes import Ranks, launched


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device that `--device` names; 'auto' is cuda, then mps, then cpu. Raises UserError when it is not here.

    With a `local_rank`, of one of several processes on a machine, cuda is the GPU of that number, in turn.
    """
    if name in ("auto", "cuda") and local_rank is not None and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = one_line(error).split(". ")[0][:160]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu") from error
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """'fp32' or 'bf16'; 'auto' is bf16 where the hardware is made for it: new GPUs, CPUs with AVX-512-BF16 or AMX."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_has_bfloat16() else "fp32"


def dtype_of(precision: str) -> torch.dtype:
    """The torch type of a precision's name."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def seed_everything(seed: int) -> None:
    """Seed torch (all devices) and numpy; called before anything is drawn."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def derived_seed(*keys: int) -> int:
    """One well-mixed seed from several numbers, as (seed, epoch): neighbours give unrelated streams."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def generator(*keys: int) -> torch.Generator:
    """A CPU generator seeded from several numbers; drawing on the CPU gives every device the same numbers."""
    return torch.Generator().manual_seed(derived_seed(*keys))


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("torchvision", "numpy", "matplotlib")
    own = {"python": platform.python_version(), "torch": str(torch.__version__)}  # which tells the build too
    return own | {package: version(package) for package in packages}


def machine(device: torch.device) -> dict[str, Any]:
    """What a result ran on: processor, cores, device, threads, system."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": launched(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def tensor_hash(*tensors: torch.Tensor) -> str:
    """SHA-256 over the bytes of tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()


def duration(seconds: float) -> str:
    """Seconds as a person says them: '8 s', '3 min 20 s', '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def release_memory() -> None:
    """Give memory that was freed back to the system where the C library (glibc) would keep it for itself."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


def apply_threads(threads: int | None) -> int:
    """Set the number of CPU threads where one is asked for; returns the number in force."""
    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def resolve_compile(name: str, device: torch.device, deterministic: bool = False) -> str:
    """'on' or 'off'; 'auto' is on for CUDA, and off elsewhere: on a CPU compiling was measured not to pay.

    It is off as well for `deterministic`, since a compiler that times its kernels may take others the next time; 'on'
    beside that raises UserError.
    """
    if deterministic and name == "on":
        raise UserError("--compile on may give other bits the next time; leave it or --deterministic out")
    return name if name != "auto" else ("on" if device.type == "cuda" and not deterministic else "off")


def make_deterministic(wanted: bool) -> None:
    """Let torch take algorithms only that give the same bits each time (or again any); an error where it has none."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA multiplies for the first time
    torch.backends.cudnn.benchmark = not wanted  # CUDA tries which convolution is the fastest, as sizes stay the same
    torch.use_deterministic_algorithms(wanted)


def set_up_machine(args: argparse.Namespace, team: Ranks) -> torch.device:
    """Make the automatic choices of device, precision and threads, in `args`, and seed; before anything is drawn."""
    make_deterministic(args.deterministic)
    device = resolve_device(args.device, team.local_rank if team.size > 1 else None)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    args.device = str(device) if team.size == 1 else device.type  # of several processes each has its own
    args.compile = resolve_compile(args.compile, device, args.deterministic)
    args.precision = resolve_precision(args.precision, device)
    args.threads = apply_threads(args.threads)
    seed_everything(args.seed)
    if args.precision == "fp32":  # by default CUDA rounds the inputs of convolutions to TF32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    require_alike(args, team)
    return device


def require_alike(args: argparse.Namespace, team: Ranks) -> None:
    """UserError unless all processes have made the same choices: results of one run are told under one heading."""
    choices = {name: getattr(args, name) for name in ("device", "precision", "compile", "threads")}
    for name, values in _columns(team.gather(choices | {"torch": str(torch.__version__)})).items():
        if len(values) > 1:
            raise UserError(f"the processes differ in {name} ({', '.join(map(str, sorted(values)))}); make them alike")


def _columns(rows: list[dict[str, Any]]) -> dict[str, set[Any]]:
    """Name -> all values that it has in rows of the same names."""
    return {name: {row[name] for row in rows} for name in rows[0]}
