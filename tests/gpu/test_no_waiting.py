"""Between two progress lines the host of a GPU waits for nothing."""

import pytest
import torch

from heptapod_fast.train.loop import begin_phase, training_step
from heptapod_fast.train.metrics import Meter
from tests.running import NO_HEAD, start_on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CASES = {
    "codes": {"micro_batch": 4},
    "synthetic": {"data": "synthetic", "num_classes": 5},
    "mar": {"steps": "mar", "dropout": 0.1},
    "local": {"head": "local", "window": 4, "density": 2, "skip_spikes": 3.0},
    "llamagen": {"system": "llamagen"} | NO_HEAD,
    "npp": {"system": "npp"} | NO_HEAD,
    "sar": {"system": "sar"} | NO_HEAD,
}


@pytest.mark.parametrize("graph", ["off", "on"])
@pytest.mark.parametrize("name", CASES)
def test_steps_between_two_progress_lines_do_not_wait(tmp_path, name, graph):
    session, state = start_on_gpu(tmp_path, cuda_graph=graph, images=2048, **CASES[name])
    meter = Meter(2048, None, 1, session.world.device)
    phase = begin_phase(session, state, meter)

    def steps(count):
        for _ in range(count):
            loss, norm = training_step(session, state, phase, meter)
            meter.add(loss, norm, 8)

    steps(6)  # loads kernels and captures, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.record(state.images)["loss"] > 0
