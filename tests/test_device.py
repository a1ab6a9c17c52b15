"""The device: which one, in which dtype, and how fast it is on paper. No GPU is needed."""

import platform
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import HERE, TINY
from torch.distributed.distributed_c10d import BackendConfig

import train
from plumbing import device, processes
from plumbing.device import choose_device, peak_flops


@pytest.mark.parametrize("pays, name", [
    (False, "float32 (bfloat16 is not faster here)"),
    (True, "bfloat16 (bfloat16 is faster here)"),
])
def test_auto_dtype_is_the_fast_one_on_this_CPU(pays, name, monkeypatch):
    monkeypatch.setattr(device, "bf16_pays", lambda: pays)
    chosen, bf16, line = choose_device("cpu", "auto")
    assert chosen == torch.device("cpu")
    assert bf16 == pays
    assert line.endswith(name)


def test_dtype_that_was_asked_for_is_taken_even_if_it_is_slow(monkeypatch):
    monkeypatch.setattr(device, "bf16_pays", lambda: False)
    assert choose_device("cpu", "bfloat16")[1]
    monkeypatch.setattr(device, "bf16_pays", lambda: True)
    assert not choose_device("cpu", "float32")[1]


@pytest.fixture
def two_gpus(monkeypatch):
    """This machine pretends to have two GPUs -> the list of numbers given to set_device."""
    chosen = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, device: empty(n))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("asked, name, number", [
    ("auto", "cuda", 0),
    ("cuda", "cuda", 0),
    ("cuda:1", "cuda:1", 1),
])
def test_GPU_is_chosen_by_its_number(asked, name, number, two_gpus):
    """torch.cuda.set_device rejects a bare "cuda"."""
    chosen, bf16, line = choose_device(asked, "auto")
    assert chosen == torch.device(name) and bf16
    assert two_gpus == [number]
    assert ("NVIDIA H200" in line) == (asked == "auto")


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_process_of_torchrun_gets_the_GPU_of_its_local_rank(asked, two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(asked, "auto")[0] == torch.device("cuda:1")
    assert two_gpus == [1]


def test_more_processes_than_GPUs_are_refused(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"finds 2 GPU\(s\)"):
        choose_device("auto", "auto")


def test_processes_of_torchrun_may_not_all_ask_for_one_GPU(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="device=cuda:1: torchrun gives each process a GPU"):
        choose_device("cuda:1", "auto")


@pytest.mark.parametrize("name, flops", [
    ("NVIDIA H200", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA GeForce RTX 4090", 165e12),
    ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 3090 Ti", None),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L40", None),
    ("Tesla T4", None),
])
def test_peak_is_that_of_the_very_device_or_unknown(name, flops):
    assert peak_flops(name) == flops


@pytest.mark.parametrize("gpu, backends", [
    (True, {"cpu": "gloo", "cuda": "nccl"}),
    (False, {"cpu": "gloo"}),
])
def test_CPU_and_GPU_tensors_both_reach_the_other_processes(gpu, backends, monkeypatch):
    """all_reduce() sends CPU tensors, DDP and FSDP send those of the GPU: each needs a backend."""
    named = []

    def note(backend=None, **others):
        named.append(backend)
    monkeypatch.setattr(dist, "init_process_group", note)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(processes, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 1)]))
    for name in ("RANK", *processes.FROM_TORCHRUN):
        monkeypatch.setenv(name, "0")
    processes.join()
    found = BackendConfig(dist.Backend(named[0])).get_device_backend_map()
    assert {device: found[device] for device in backends} == backends


PROGRAM = """
import ctypes, sys
from assessment.measure import process_mb
from plumbing.device import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
before = process_mb("VmRSS:")
block = ctypes.c_void_p(libc.malloc(400_000_000))
ctypes.memset(block, 1, 400_000_000)
libc.free(block)
print(process_mb("VmRSS:") - before)
"""


def test_training_on_a_cpu_keeps_the_memory(monkeypatch):
    kept = []
    monkeypatch.setattr(train, "keep_freed_memory", lambda: kept.append(True))
    train.main([*TINY, "--max_iters=1"])
    assert kept == [True]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is changed")
def test_freed_memory_is_kept():
    held = {}
    for word in ("keep", "as it is"):
        command = [sys.executable, "-c", PROGRAM, word]
        done = subprocess.run(command, cwd=HERE, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        held[word] = float(done.stdout)   # of 400 MB
    assert held["keep"] > 390 and held["as it is"] < 20
