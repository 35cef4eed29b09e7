"""The machine under a run: device, precision, threads, seeds, determinism; and what a record tells of it."""

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

from sparsity.system import processes
from sparsity.system.errors import UserError, one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def set_up_machine(args: Any) -> torch.device:
    """Resolve the machine's flags in `args`, in place: device, precision, threads, compile; and seed everything.

    Called before anything is drawn. Raises UserError for what cannot be used here, and where the processes of a run
    have come to different choices.
    """
    make_deterministic(args.deterministic)
    device = resolve_device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    args.device = str(device) if processes.size() == 1 else device.type  # of several processes each has its own
    args.compile = resolve_compile(args.compile, device, args.deterministic)
    args.precision = resolve_precision(args.precision, device)
    args.threads = apply_threads(args.threads)
    keep_memory()
    torch.manual_seed(args.seed)  # on all devices
    if args.precision == "fp32":  # by default CUDA rounds the inputs of convolutions to TF32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for name in ("device", "precision", "compile", "threads"):
        if len(set(values := processes.gather(getattr(args, name)))) > 1:
            raise UserError(f"the processes differ in {name} ({', '.join(map(str, values))}); make them alike")
    return device


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names; 'auto' is cuda, then mps, then cpu. Raises UserError when it is not here.

    Each of several processes on a machine gets a GPU of its own for cuda, in turn.
    """
    if name in ("auto", "cuda") and processes.size() > 1 and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
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
    flags = cpu_info("flags").split() if device.type == "cpu" else []
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def resolve_compile(name: str, device: torch.device, deterministic: bool = False) -> str:
    """'on' or 'off'; 'auto' is on for CUDA, and off elsewhere: on a CPU compiling was measured not to pay.

    It is off as well for `deterministic`, because a compiler that times its kernels may take others the next time; 'on'
    beside that raises UserError.
    """
    if deterministic and name == "on":
        raise UserError("--compile on may give other bits the next time; leave it or --deterministic out")
    return name if name != "auto" else ("on" if device.type == "cuda" and not deterministic else "off")


def make_deterministic(wanted: bool) -> None:
    """Restrict torch to algorithms that give the same bits each time, or lift that; an error where it has none."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA multiplies for the first time
    torch.backends.cudnn.benchmark = not wanted  # CUDA tries which convolution is the fastest, as sizes stay the same
    # `torch.use_deterministic_algorithms` does the same and imports the compiler: 2 seconds and 160 MB.
    torch.set_deterministic_debug_mode("error" if wanted else "default")


def apply_threads(threads: int | None) -> int:
    """Set the number of CPU threads where one is asked for; returns the number in force."""
    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def derived_seed(*keys: int) -> int:
    """One well-mixed seed from several numbers, as (seed, epoch): neighbours give unrelated streams."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def generator(*keys: int) -> torch.Generator:
    """A CPU generator seeded from several numbers; drawing on the CPU gives every device the same numbers."""
    return torch.Generator().manual_seed(derived_seed(*keys))


def tensor_hash(*tensors: torch.Tensor) -> str:
    """SHA-256 over the bytes of tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("torchvision", "numpy", "matplotlib")
    own = {"python": platform.python_version(), "torch": str(torch.__version__)}  # which tells the build too
    return own | {package: version(package) for package in packages}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The hardware that a result comes from: processor, cores, device, threads, processes, system."""
    processor = cpu_info("model name") or platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes.size(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_info(key: str) -> str:
    """The first line of a key of /proc/cpuinfo; empty where there is no such file or key."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def keep_memory() -> None:
    """Keep freed memory for the next allocation, where the C library is glibc, until `release_memory`.

    By default glibc gives large buffers back at once, and the system clears the pages of each activation of each
    training step anew.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        # M_MMAP_THRESHOLD, then M_TRIM_THRESHOLD of malloc.h; an old glibc refuses the first, and keeps its own way.
        if mallopt(-3, 2**31 - 1):
            mallopt(-1, 2**31 - 1)


def release_memory() -> None:
    """Give freed memory back to the system where the C library (glibc) would keep it for itself."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
