"""Options of sampling: what cannot be is refused by name, before anything is drawn."""

import pytest

from heptapod_fast.sampling import SampleOptions
from heptapod_fast.systems import SYSTEMS
from heptapod_fast.systems.heptapod import HeptapodOptions
from heptapod_fast.tokenizers import token_spec

CODES = token_spec("patch-vq", 4, 1, 11)
VECTORS = token_spec("patch", 4, 1)


@pytest.mark.parametrize(
    "spec, options, message",
    [
        (CODES, {"positions_per_step": 0}, "--positions-per-step 0"),
        (CODES, {"positions_per_step": 17}, "--positions-per-step 17"),
        (CODES, {"temperature": -1.0}, "--temperature"),
        (CODES, {"top_p": 0.0}, "--top-p"),
        (CODES, {"top_p": 1.1}, "--top-p"),
        (CODES, {"top_k": 12}, "--top-k 12"),
        (CODES, {"top_k": -1}, "--top-k -1"),
        (VECTORS, {"top_k": 3}, "--top-k"),
        (VECTORS, {"top_p": 0.5}, "--top-p"),
        (VECTORS, {"position_order": "confidence"}, "--position-order confidence"),
        (CODES, {"diffusion_steps": 10}, "--diffusion-steps 10 needs continuous tokens"),
        (CODES, {"diffusion_sampler": "ddim"}, "--diffusion-sampler ddim needs continuous tokens"),
        (VECTORS, {"diffusion_steps": 0}, "--diffusion-steps 0"),
        (VECTORS, {"diffusion_steps": 1001}, "--diffusion-steps 1001"),
        (CODES, {"position_order": "likely"}, "--position-order likely"),
        (CODES, {"position_schedule": "linear"}, "--position-schedule linear"),
        (VECTORS, {"diffusion_sampler": "rk4"}, "--diffusion-sampler rk4"),
        (VECTORS, {"late_diffusion_steps": 5}, "say with --diffusion-steps how many"),
        (VECTORS, {"diffusion_steps": 5, "late_diffusion_steps": 9}, "at most --diffusion-steps"),
        (CODES, {"late_diffusion_steps": 5}, "--late-diffusion-steps 5 needs continuous tokens"),
        (VECTORS, {"diffusion_steps": 9, "late_diffusion_steps": 0}, "--late-diffusion-steps 0"),
    ],
)
def test_bad_options_name_the_flag(spec, options, message):
    with pytest.raises(ValueError) as error:
        HeptapodOptions(**options).check_tokens(spec)
    assert message in str(error.value)


def test_good_options_pass():
    SampleOptions().check_tokens(VECTORS)
    HeptapodOptions(
        top_k=11,
        top_p=0.5,
        temperature=0.0,
        position_order="confidence",
        positions_per_step=16,
        position_schedule="cosine",
    ).check_tokens(CODES)


@pytest.mark.parametrize(
    "system, options, message",
    [
        ("1d-random", {"positions_per_step": 2}, "--positions-per-step 2: .* one next token"),
        ("1d-raster", {"position_order": "confidence"}, "--position-order confidence: .* one next"),
        ("1d-raster", {"guidance": 2.0}, "--guidance 2.0: .* without a null class"),
        ("heptapod", {"guidance": 1.5}, "--guidance 1.5: .* without a null class"),
        ("heptapod", {"hue": 1}, "--hue: this system samples with --temperature, .*--top-k"),
    ],
)
def test_an_option_that_a_system_does_not_understand_is_refused(system, options, message):
    with pytest.raises(ValueError, match=message):
        SYSTEMS[system].options(**options)


def test_options_given_by_name_leave_the_others_at_their_defaults():
    assert SYSTEMS["heptapod"].options(top_k=3) == HeptapodOptions(top_k=3)
    assert SYSTEMS["1d-raster"].options() == SampleOptions()


def test_steps_fall_on_a_line_from_the_first_token_to_the_last():
    options = HeptapodOptions(diffusion_steps=50, late_diffusion_steps=5, temperature=0.9)
    steps = [options.at(seen / 9).diffusion_steps for seen in range(10)]
    assert steps == [50, 45, 40, 35, 30, 25, 20, 15, 10, 5]
    assert options.at(0.5).temperature == 0.9 and type(options.at(0.5)) is HeptapodOptions
    plain = HeptapodOptions(diffusion_steps=50)
    assert plain.at(0.9) is plain
