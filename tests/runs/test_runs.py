"""The run directory: who may write, what is refused, and how a run is read back."""

import fcntl
import shutil

import pytest
import torch

from heptapod_fast import load_run
from heptapod_fast.checkpoints import CheckpointError
from heptapod_fast.rng import Rng
from heptapod_fast.runs import RunDir, RunError
from heptapod_fast.tokenizers import load_tokenizer
from tests.running import final_tensors, tiny_config, train_here


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with two averages, which differ from the start on (a decay is at most
    (1 + step) / (10 + step))."""
    out = tmp_path_factory.mktemp("trained")
    train_here(out, ema=(0.9999, 0.1), images=32)
    return out


def weights(run):
    return {name: p.detach() for name, p in run.system.named_parameters()}


@pytest.mark.parametrize(
    "ema, file",
    [(None, "ema-0.9999"), ("0.1", "ema-0.1"), ("none", "model"), ("ema-0.9999", "ema-0.9999")],
)
def test_load_run_takes_the_average_asked_for(trained, ema, file):
    run = load_run(trained, ema=ema, device="cpu")
    assert run.weights == file
    expected = final_tensors(trained, file)
    assert weights(run).keys() == expected.keys()
    assert all(torch.equal(w, expected[name]) for name, w in weights(run).items())


def test_load_run_is_ready_to_sample(trained):
    run = load_run(trained, device="cpu", precision="fp32")
    assert not run.system.training
    assert not any(p.requires_grad for p in run.system.parameters())
    assert run.class_names[0] == "2-fold"
    assert run.images_seen == 32
    assert run.checkpoint.name == "step-00000004"
    assert run.config.recipe.ema == (0.9999, 0.1)
    tokens = run.sample(torch.tensor([0, 1]), Rng(0), temperature=0.9)
    assert torch.equal(
        tokens,
        run.sample(torch.tensor([0, 1]), Rng(0), run.system.options(temperature=0.9)),
    )
    assert run.decode(tokens).shape == (2, 3, 24, 24)


def test_a_run_on_synthetic_tokens_samples_but_decodes_nothing(tmp_path):
    train_here(tmp_path, data="synthetic", logogram_count=None, num_classes=3, images=16)
    run = load_run(tmp_path, device="cpu")
    tokens = run.sample(torch.tensor([0, 2]), Rng(0))
    assert tokens.shape == (2, 36)
    with pytest.raises(RunError, match="synthetic tokens: nothing can be decoded"):
        run.decode(tokens)


def test_options_come_in_one_way(trained):
    run = load_run(trained, device="cpu")
    with pytest.raises(TypeError, match="top_k beside options"):
        run.sample(torch.tensor([0]), Rng(0), run.system.options(temperature=0.5), top_k=3)


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)], ids=("fp32", "bf16")
)
def test_load_run_samples_in_the_precision_of_the_run(tmp_path, precision, dtype):
    """Whatever this machine would choose by itself."""
    train_here(tmp_path, images=16, precision=precision)
    assert load_run(tmp_path, device="cpu").system.backbone.dtype == dtype
    other = {"fp32": "bf16", "bf16": "fp32"}[precision]
    assert load_run(tmp_path, device="cpu", precision=other).system.backbone.dtype != dtype


def test_a_damaged_last_checkpoint_is_not_a_finished_run(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    assert RunDir(copy).finished(32) == 32
    assert RunDir(copy).finished(33) == 0
    weights_file = copy / "checkpoints" / "step-00000004" / "model.safetensors"
    spoilt = bytearray(weights_file.read_bytes())
    spoilt[-1] ^= 1
    weights_file.write_bytes(spoilt)
    assert RunDir(copy).finished(32) == 0


def test_load_run_takes_the_step_asked_for(trained):
    assert load_run(trained, checkpoint=2, device="cpu").images_seen == 16
    with pytest.raises(CheckpointError, match="--checkpoint 3: .* the steps 2, 4"):
        load_run(trained, checkpoint=3, device="cpu")


def test_an_unknown_average_is_refused_with_the_list(trained):
    with pytest.raises(RunError, match="--ema 0.7: this run keeps ema-0.9999, ema-0.1, and 'none'"):
        load_run(trained, ema="0.7", device="cpu")


def test_a_run_without_averages_gives_its_weights(tmp_path):
    train_here(tmp_path, ema=(), images=16)
    expected = final_tensors(tmp_path)
    assert all(
        torch.equal(w, expected[n]) for n, w in weights(load_run(tmp_path, device="cpu")).items()
    )


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is not a run directory: it has no config.json"):
        load_run(tmp_path)
    RunDir(tmp_path).claim(tiny_config(tmp_path))
    with pytest.raises(CheckpointError, match="holds no checkpoint: train first"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"size": "tiny"}', '{"size": "tiny", "ema": [], "new_setting": 1}'],
)
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match="config.json cannot be read"):
        load_run(tmp_path)


def test_another_or_a_lost_codebook_is_refused(tmp_path):
    train_here(tmp_path, images=16)
    run = RunDir(tmp_path)
    tokenizer = load_tokenizer("patch-vq", run.codebook)
    tokenizer.codebook_VE[0, 0] += 0.01
    tokenizer.save(run.codebook)
    with pytest.raises(RunError, match="tokenizer.safetensors is not what .* was trained with"):
        load_run(tmp_path, device="cpu")
    with pytest.raises(RunError, match="other data and tokenizer: .*codebook .*tokenizer.safe"):
        train_here(tmp_path, images=16)
    run.codebook.unlink()
    with pytest.raises(RunError, match="tokenizer.safetensors is missing"):
        load_run(tmp_path, device="cpu")
    train_here(tmp_path, images=16)  # training fits it again, to the same codes
    load_run(tmp_path, device="cpu")


def test_claim_makes_the_directory(tmp_path):
    config = tiny_config(tmp_path / "deep" / "run")
    run = RunDir(config.run_dir())
    assert run.claim(config) == []
    assert {p.name for p in run.path.iterdir()} == {
        ".lock",
        "config.json",
        "samples",
        "checkpoints",
    }
    assert run.read_config() == config


def test_one_writer_at_a_time(tmp_path):
    config = tiny_config(tmp_path)
    first, second = RunDir(tmp_path), RunDir(tmp_path)
    first.claim(config)
    with pytest.raises(RunError, match="is in use by process [0-9]+ on .*--out"):
        second.claim(config)
    first.release()
    second.claim(config)
    second.release()
    second.release()


def test_a_dead_process_holds_nothing(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on elsewhere")
    RunDir(tmp_path).claim(tiny_config(tmp_path))


def test_a_claim_that_fails_lets_go(tmp_path):
    begun(tmp_path)
    with pytest.raises(RunError):
        RunDir(tmp_path).claim(tiny_config(tmp_path, seed=5))
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def begun(folder):
    """A run that has logged something."""
    RunDir(folder).claim(tiny_config(folder))
    (folder / "metrics.jsonl").write_text("")


def test_another_configuration_is_refused_naming_the_flags(tmp_path):
    begun(tmp_path)
    with pytest.raises(RunError, match=r"--seed 3 \(was 0\); --width 64 \(was 32\).*--out"):
        RunDir(tmp_path).claim(tiny_config(tmp_path, width=64, seed=3))
    assert RunDir(tmp_path).read_config() == tiny_config(tmp_path)


def test_a_start_that_failed_before_anything_was_done_can_be_corrected(tmp_path):
    RunDir(tmp_path).claim(tiny_config(tmp_path))
    (tmp_path / "tokenizer.safetensors").write_text("of 16 codes")
    assert RunDir(tmp_path).claim(tiny_config(tmp_path, codes=32)) == []
    assert RunDir(tmp_path).read_config().data.codes == 32
    assert not (tmp_path / "tokenizer.safetensors").exists()


def test_what_may_change_is_listed(tmp_path):
    RunDir(tmp_path).claim(tiny_config(tmp_path))
    changed = RunDir(tmp_path).claim(tiny_config(tmp_path, images=128, micro_batch=2))
    assert changed == ["--images 128 (was 64)", "--micro-batch 2 (was none)"]
    assert RunDir(tmp_path).read_config().recipe.images == 128


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not a run directory but holds.*thesis.tex.*--out"):
        RunDir(tmp_path).claim(tiny_config(tmp_path))
    assert not (tmp_path / "config.json").exists()


def test_a_start_cut_off_before_its_settings_were_written_goes_on(tmp_path):
    (tmp_path / "config.tmp").write_text("{")
    (tmp_path / ".lock").write_text("")
    config = tiny_config(tmp_path)
    RunDir(tmp_path).claim(config)
    assert RunDir(tmp_path).read_config() == config


@pytest.mark.parametrize("name", [".", "samples", "checkpoints", ".lock"])
def test_something_in_the_way_is_a_clear_error(tmp_path, name):
    config, out = tiny_config(tmp_path / "run"), tmp_path / "run"
    if name == ".":
        out.write_text("a file")
    else:
        RunDir(out).claim(config)
        (out / name).unlink() if name == ".lock" else (out / name).rmdir()
        (out / name).mkdir() if name == ".lock" else (out / name).write_text("a file")
    with pytest.raises(RunError, match="cannot write to the run directory .*run.*--out"):
        RunDir(out).claim(config)


def test_leftovers_of_interrupted_writes_are_removed(tmp_path):
    config = tiny_config(tmp_path)
    RunDir(tmp_path).claim(config)
    (tmp_path / "checkpoints" / "step-00000003.tmp").mkdir()
    RunDir(tmp_path).claim(config)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_damaged_codebook_of_the_run_is_named_with_what_to_do(tmp_path):
    train_here(tmp_path, images=16)
    RunDir(tmp_path).codebook.write_bytes(b"no tensors")
    for use in (lambda: train_here(tmp_path, images=32), lambda: load_run(tmp_path)):
        with pytest.raises(RunError, match="tokenizer.safetensors is damaged.* copy") as error:
            use()
        assert "--tokenizer-weights" not in str(error.value)


def test_a_claim_can_be_taken_back_while_nothing_came_of_it(tmp_path):
    run = RunDir(tmp_path / "run")
    config = tiny_config(run.path)
    for there in (None, run.codebook, run.samples / "grid.png", run.checkpoints / "step-1"):
        run.claim(config)
        if there is not None:
            there.write_text("")
        run.withdraw()
        run.release()
        assert run.path.exists() is (there is not None)
        if there is not None:
            assert run.read_config() == config
            shutil.rmtree(run.path)


def test_a_claim_of_a_directory_that_was_there_takes_nothing_back(tmp_path):
    config = tiny_config(tmp_path)
    first = RunDir(tmp_path)
    first.claim(config)
    second = RunDir(tmp_path)
    with pytest.raises(RunError, match="in use"):
        second.claim(config)
    for run in (second, first):
        run.withdraw()
        run.release()
        assert first.read_config() == config


def test_what_file_managers_leave_is_no_foreign_file(tmp_path):
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_text("?")
    RunDir(tmp_path).claim(tiny_config(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("?")
    with pytest.raises(RunError, match="holds letter.txt: choose another --out"):
        RunDir(other).claim(tiny_config(other))
