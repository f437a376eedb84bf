"""What a process says of its machine."""

import platform
import subprocess
import sys

import torch

from heptapod_fast.world import processor_kind


def kind_with(monkeypatch, machine: str, capability: str, bf16: bool, amx: bool) -> str:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    return processor_kind()


def test_a_kind_of_processor_names_its_instruction_sets(monkeypatch):
    assert kind_with(monkeypatch, "x86_64", "AVX2", False, False) == "AVX2"
    assert kind_with(monkeypatch, "x86_64", "AVX512", True, False) == "AVX512 + bf16"
    assert kind_with(monkeypatch, "x86_64", "AVX512", True, True) == "AVX512 + bf16 + amx"


def test_off_x86_the_architecture_stands_first(monkeypatch):
    assert kind_with(monkeypatch, "aarch64", "SVE256", False, False) == "aarch64 SVE256"


def test_the_kind_of_this_machine_is_the_same_in_every_process():
    code = "from heptapod_fast.world import processor_kind; print(processor_kind())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == processor_kind()
