"""Who runs an operation: order, asking by name, errors that say what to do."""

import warnings

import pytest
import torch

from heptapod_fast.ops import dispatch, library


@pytest.fixture
def operation(monkeypatch):
    """An operation with three implementations: fast (CUDA, float32), broken (never), reference."""
    monkeypatch.setattr(dispatch, "_registry", {})
    dispatch.register(
        "op",
        "fast",
        lambda device, dtype: (
            None if device.type == "cuda" and dtype == torch.float32 else "needs float32 on CUDA"
        ),
    )
    dispatch.register("op", "broken", lambda device, dtype: "install the package broken")
    dispatch.register("op", "reference", lambda device, dtype: None)
    return "op"


def test_the_first_usable_one_runs_and_the_reason_names_the_skipped(operation):
    assert dispatch.implementations(operation) == ("fast", "broken", "reference")
    assert dispatch.choose(operation, "cuda", torch.float32).implementation == "fast"
    chosen = dispatch.choose(operation, torch.device("cpu"), torch.float32)
    assert chosen.implementation == "reference"
    assert "fast: needs float32 on CUDA" in chosen.reason
    assert "install the package broken" in str(chosen)


def test_a_named_one_runs_although_another_is_preferred(operation):
    chosen = dispatch.choose(operation, "cuda", torch.float32, "reference")
    assert chosen == dispatch.Choice(operation, "reference", "asked for")


def test_an_unknown_name_is_refused_with_the_names(operation):
    with pytest.raises(ValueError, match="'quick'.*auto, fast, broken, reference"):
        dispatch.choose(operation, "cpu", torch.float32, "quick")


def test_a_named_one_that_cannot_run_is_an_error_that_says_why(operation):
    with pytest.raises(dispatch.Unavailable, match="install the package broken"):
        dispatch.choose(operation, "cuda", torch.float32, "broken")


def test_nothing_usable_is_an_error_with_every_reason(operation):
    dispatch.register("other", "fast", lambda device, dtype: "needs a GPU")
    with pytest.raises(dispatch.Unavailable, match="not fast: needs a GPU"):
        dispatch.choose("other", "cpu", torch.float32)


def test_names_are_taken_once_and_operations_are_known(operation):
    for name in ("fast", "auto"):
        with pytest.raises(ValueError, match="already"):
            dispatch.register(operation, name, lambda device, dtype: None)
    with pytest.raises(ValueError, match="known: op"):
        dispatch.choose("no such", "cpu", torch.float32)


def test_shapes_that_a_kernel_cannot_take_are_told_once_or_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {})
    monkeypatch.setattr(dispatch, "_told", set())
    for name in ("triton", "reference"):
        dispatch.register("op", name, lambda device, dtype: None)
    cpu = torch.device("cpu")
    assert dispatch.select("op", cpu, torch.float32) == "triton"
    with pytest.warns(UserWarning, match="op: 'triton' cannot take.*too wide.*reference runs"):
        assert dispatch.select("op", cpu, torch.float32, "auto", "too wide") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.select("op", cpu, torch.float32, "auto", "too wide") == "reference"
    with pytest.raises(dispatch.Unavailable, match="too wide"):
        dispatch.select("op", cpu, torch.float32, "triton", "too wide")


def test_operators_hand_on_what_was_asked(operation):
    choices = [dispatch.choose(operation, "cpu", torch.float32, "reference")]
    operators = dispatch.Operators({operation: "reference"}, choices)
    assert operators[operation] == "reference"
    assert operators["another"] == "auto"
    assert operators.lines() == ["op: reference (asked for)"]
    assert dispatch.AUTO[operation] == "auto"
    assert dispatch.AUTO.lines() == []


def test_operations_by_their_implementations(operation):
    assert dispatch.operations("fast") == ("op",)
    assert dispatch.operations("quick") == ()


def test_operations_that_run_alike_share_a_line():
    choices = [
        dispatch.Choice(name, "triton" if name < "c" else "reference", "why") for name in "abc"
    ]
    assert dispatch.summary(choices) == ["a, b: triton (why)", "c: reference (why)"]


def test_a_missing_library_is_reported_not_raised(tmp_path, monkeypatch):
    holds, why_not = library._load(tmp_path / "absent.so")
    assert holds == "" and "not built" in why_not and "nvcc" in why_not
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a shared library")
    holds, why_not = library._load(broken)
    assert holds == "" and torch.__version__ in why_not and "\n" not in why_not
    monkeypatch.setattr(library, "_missing", why_not)
    assert not library.available("cpu") and not library.available("cuda")
    with pytest.raises(dispatch.Unavailable, match="does not fit torch"):
        dispatch.choose("philox", "cpu", torch.int64, "cpu")
    assert dispatch.choose("philox", "cpu", torch.int64).implementation == "reference"


@pytest.mark.parametrize("capability, usable", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_that_the_library_has_no_code_for(monkeypatch, capability, usable):
    """The CUDA operators are passed over there with a reason, and asking for them is an error."""
    monkeypatch.setattr(library, "_missing", "")
    monkeypatch.setattr(library, "_holds", "CPU + CUDA (sm_80, sm_90a)")
    monkeypatch.setattr(dispatch, "capability", lambda device: capability)
    for operation, dtype in (
        ("adamw_ema", torch.float32),
        ("global_norm", torch.float32),
        ("philox", torch.int64),
    ):
        choice = dispatch.choose(operation, "cuda", dtype)
        if usable:
            assert choice.implementation == "cuda"
            assert dispatch.choose(operation, "cuda", dtype, "cuda").reason == "asked for"
            continue
        assert choice.implementation == "reference"
        assert "than compute capability 8.0, this GPU has 7.5" in choice.reason
        with pytest.raises(dispatch.Unavailable, match="older than compute capability 8.0"):
            dispatch.choose(operation, "cuda", dtype, "cuda")


def test_the_oldest_architecture_of_a_library(monkeypatch):
    for holds, oldest in (("sm_80, sm_90a", (8, 0)), ("sm_120, sm_100a, sm_103f", (10, 0))):
        monkeypatch.setattr(library, "_holds", f"CPU + CUDA ({holds})")
        assert library.oldest_capability() == oldest


def test_integers_have_no_tangents_that_a_kernel_could_lose(monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {})
    monkeypatch.setattr(dispatch, "_told", set())
    for name in ("cpu", "reference"):
        dispatch.register("op", name, lambda device, dtype: None)
    cpu = torch.device("cpu")
    with torch.autograd.forward_ad.dual_level():
        assert dispatch.select("op", cpu, torch.int64) == "cpu"
        with pytest.warns(UserWarning, match="no forward-mode derivatives"):
            assert dispatch.select("op", cpu, torch.float32) == "reference"


def test_a_warning_does_not_break_a_compiled_graph():
    """torch.compile asks for the implementation once, and does not trace how it is found."""

    def function(x):
        name = dispatch.select("layer_norm", x.device, x.dtype, unsupported="of a width of 7")
        return x + len(name)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compiled(torch.zeros(2))
    assert found.tolist() == [len("reference")] * 2
