"""The device: which one, whether bfloat16 and torch.compile pay on it, and its peak speed."""

import ctypes
import functools
import math
import os
import time

import torch
import torch.distributed as dist

from plumbing.errors import InputError, first_line
from plumbing.processes import all_reduce

# Dense bfloat16 FLOPs per second, by data sheet; a longer name stands before its prefix. A device
# that is not listed gets no MFU rather than a wrong one.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "L4": 121e12,
}


def choose_device(device, dtype):
    """
    device    auto, cuda, cuda:1, mps or cpu
    dtype     auto, bfloat16 or float32; auto is bfloat16 where matrix products are faster in it

    returns   torch.device, True for bfloat16, and a line that says what was chosen and why
    raises    InputError for a device that this machine does not have

    Under torchrun every process gets a GPU of its own, and all processes choose the same dtype.
    """
    if device == "auto":
        name, reason = best_device()
    else:
        name = device
        reason = "as asked"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = gpu_of_this_process(name)
    chosen = open_device(name, asked=device)

    if dtype == "auto":
        bf16 = bf16_pays_on(chosen)
        faster = "faster" if bf16 else "not faster"
        dtype_reason = f"bfloat16 is {faster} here"
    else:
        bf16 = dtype == "bfloat16"
        dtype_reason = "as asked"
    dtype_name = "bfloat16" if bf16 else "float32"
    return chosen, bf16, f"device: {chosen} ({reason}), {dtype_name} ({dtype_reason})"


def best_device():
    """-> the name of the fastest device here, and the reason for it"""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    if "LOCAL_RANK" in os.environ:   # torch cannot run several processes on an Apple GPU
        return "cpu", f"no CUDA GPU found; {torch.get_num_threads()} threads"
    if torch.backends.mps.is_available():
        return "mps", "Apple GPU"
    return "cpu", f"no CUDA or Apple GPU found; {torch.get_num_threads()} threads"


def gpu_of_this_process(name):
    """Under torchrun, "cuda" -> "cuda:<local rank>"."""
    if name != "cuda":
        raise InputError(
            f"device={name}: torchrun gives each process a GPU of its own; leave --device out"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise InputError(
            f"local rank {local_rank} needs a GPU of its own, but finds {gpus} GPU(s) here: start "
            "one process per GPU, or hide the GPUs: CUDA_VISIBLE_DEVICES= torchrun ..."
        )
    return f"cuda:{local_rank}"


def open_device(name, asked):
    """name -> torch.device, tried and made the current one; asked is the setting, for the error."""
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("must be auto, cuda, cuda:1, mps or cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(
            f"device={asked}: {first_line(e)}; --device=auto takes the best one available"
        ) from None
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)   # set_device rejects a bare "cuda"
    return device


def bf16_pays_on(device):
    """Whether matrix products on device are faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":   # all processes must agree, though each measures for itself
        return bool(all_reduce(bf16_pays(), dist.ReduceOp.MIN))
    return False   # mps: float32 works on every version of macOS


@functools.cache
def bf16_pays():
    """
    Whether this CPU multiplies matrices in bfloat16 more than 1.3 times as fast as in float32, by
    measurement: some CPUs support bfloat16 but run it slowly.
    """
    a = torch.ones(128, 768)
    b = torch.ones(768, 768)
    pairs = {"float32": (a, b), "bfloat16": (a.bfloat16(), b.bfloat16())}
    seconds = dict.fromkeys(pairs, math.inf)
    for _ in range(5):   # alternate, so that other load on the machine slows down both
        for dtype, (left, right) in pairs.items():
            start = time.perf_counter()
            left @ right
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds["float32"] > 1.3 * seconds["bfloat16"]


def choose_attention_kernels(device, bf16, config):
    """
    For the training of a model with this GPTConfig: torch's flash attention, except on CPUs in
    bfloat16 if sequences or windows are shorter than 256 tokens. There the one of torch 2.13 takes
    at least twice the time of plain matrix products.
    """
    shortest = min(min(W or config.block_size, config.block_size) for W in config.windows)
    slow = device.type == "cpu" and bf16 and shortest < 256
    torch.backends.cuda.enable_flash_sdp(not slow)   # despite its name this covers CPUs too
    if any(config.windows):
        disable_cudnn_attention()


def keep_freed_memory():
    """
    Have glibc keep the memory of freed tensors and use it again. As it is, it gives large ones back
    to the system, whose fresh pages cost each training step time: see docs/speed.md.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4   # as malloc.h has them
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
    except (OSError, AttributeError, TypeError):   # not Linux with glibc
        pass


def padded(vocab_size):
    """
    For the head of a new model: GPUs have no fast kernel for rows of 50,257 numbers, but one for
    multiples of 64. So it gets a few ids that no text contains; sample.py and exports leave them
    out.
    """
    if vocab_size < 1024:   # characters: not worth it
        return vocab_size
    return 64 * math.ceil(vocab_size / 64)


def disable_cudnn_attention():
    """
    torch prefers cuDNN's attention on GPUs. Its gradients are NaN with some masks
    (pytorch/pytorch#196678), and it makes a new plan for every length of the cache, which takes
    about 40 ms (pytorch/pytorch#191576).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def to_device(tensors, device):
    """Copies of CPU tensors. From pinned memory a GPU fetches them while the CPU goes on."""
    if device.type == "cuda":   # not mps: asynchronous copies to Apple GPUs have lost data
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]


def compiler_problem(device):
    """None if torch.compile works on this machine, otherwise the reason why not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as e:
        return f"{type(e).__name__}: {first_line(e):.200}"
    return None


def peak_flops(name):
    """The FLOPs per second of a device named like "NVIDIA H100 80GB HBM3", or None if unknown."""
    words = set(name.replace("-", " ").split())
    if words & {"Laptop", "Ti", "D", "MIG"}:   # siblings of another speed
        return None
    for listed, flops in PEAK_FLOPS.items():
        if set(listed.split()) <= words:
            return flops
    return None
