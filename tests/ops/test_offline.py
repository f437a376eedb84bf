"""Every kernel, in every configuration of the tuning tables, compiled for GPUs without one."""

import json
import os
import subprocess
import sys

import pytest

from tests.numerics import needs_triton


@needs_triton
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", pytest.param("sm_100", marks=pytest.mark.slow)])
def test_every_case_compiles_and_fits(arch, tmp_path):
    """`python -m heptapod_fast.kernels.offline`, without the interpreter."""
    from heptapod_fast.kernels import offline

    path = tmp_path / "figures.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "heptapod_fast.kernels.offline",
            "--arch",
            arch,
            "--json",
            str(path),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    print(done.stdout)
    assert path.exists(), done.stderr
    found = json.loads(path.read_text())
    assert {case["case"] for case in found} == {case.name for case in offline.cases(arch)}
    assert len(found) > 100 and {case["arch"] for case in found} == {arch}
    wrong = {case["case"]: offline.faults(case) for case in found if offline.faults(case)}
    assert not wrong


@needs_triton
def test_faults_are_found():
    from heptapod_fast.kernels.offline import faults

    fine = dict(
        arch="sm_90",
        stack=0,
        allowed=0,
        shared=1024,
        hgmma=0,
        hmma=0,
        tensor_cores=False,
        hmma_allowed=0,
        ctas=1,
        ctas_wanted=1,
    )
    assert not faults(fine)
    assert "8 bytes of stack" in faults(fine | dict(stack=8))[0]
    assert not faults(fine | dict(stack=8, allowed=8))
    assert "shared" in faults(fine | dict(shared=240_000))[0]
    assert "matrix" in faults(fine | dict(tensor_cores=True, hmma=4))[0]
    assert not faults(fine | dict(tensor_cores=True, hgmma=4))
    assert "8 HMMA" in faults(fine | dict(tensor_cores=True, hgmma=4, hmma=8))[0]
    assert not faults(fine | dict(tensor_cores=True, hgmma=4, hmma=8, hmma_allowed=8))
    assert "1 programs" in faults(fine | dict(ctas_wanted=2))[0]


@needs_triton
def test_programs_on_an_sm():
    """By hand: 65536 registers, 64 warps, 228 KB of shared memory of which each program loses 1."""
    from heptapod_fast.kernels.offline import ctas

    assert ctas("sm_90", 128, 4, 40 * 1024) == 4 and ctas("sm_90", 129, 4, 40 * 1024) == 3
    assert ctas("sm_90", 32, 8, 0) == 8 and ctas("sm_90", 32, 4, 113 * 1024) == 2
    assert ctas("sm_90", 32, 4, 114 * 1024) == 1 and ctas("sm_80", 32, 4, 82 * 1024) == 1


@needs_triton
def test_spills_are_excused_with_a_reason():
    from heptapod_fast.kernels import offline

    assert all(
        case.why for arch in offline.ARCHITECTURES for case in offline.cases(arch) if case.spill
    )


@needs_triton
def test_tables_cover_the_model_and_refuse_beyond():
    import torch

    from heptapod_fast.kernels import tuning

    cpu = torch.device("cpu")
    for path in sorted(tuning.FOLDER.glob("*.json")):
        table = tuning.table(path.stem)
        assert "tuned" in table and {"sm_80", "sm_90"} <= table.keys()
        for kernel in table["sm_90"]:
            assert table["sm_80"].keys() == table["sm_90"].keys()
            most = tuning.largest(path.stem, kernel)
            assert tuning.lookup(path.stem, kernel, most, cpu) == table["sm_90"][kernel][str(most)]
            with pytest.raises(ValueError, match=f"above {most}"):
                tuning.lookup(path.stem, kernel, most + 1, cpu)
    with pytest.raises(RuntimeError, match="8.0 or newer, this GPU has 7.5"):
        tuning.nearest("bias_gelu", 75)
    assert tuning.nearest("bias_gelu", 89) == "sm_80"
    assert tuning.nearest("bias_gelu", 100) == "sm_90"
