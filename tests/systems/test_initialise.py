"""The start of a model: MAR's distributions, and a pure function of (seed, name)."""

import pytest
import torch

from heptapod_fast.systems import build_system


def fresh(make_config, kind="continuous", seed=0, **settings):
    config = make_config(kind, seed=seed, width=64, **settings)
    return build_system(config, config.data.num_classes)


def normal(tensor, deviation=0.02):
    tensor, count = tensor.detach(), tensor.numel()
    return (
        float(tensor.std()) == pytest.approx(deviation, rel=4 / count**0.5)
        and abs(float(tensor.mean())) < 5 * deviation / count**0.5
    )


@pytest.mark.parametrize("head", [dict(), dict(head="local", window=4)])
def test_distributions(make_config, head):
    system = fresh(make_config, embedding_std=0.03, **head)
    seen = set()
    for name, p in system.state_dict().items():
        last = name.split(".")[-2:]
        if "modulation" in name or name.startswith("token_loss.output") or last[-1] == "bias":
            kind = "zero"
            assert (p == 0).all(), name
        elif last[0].startswith("norm"):
            kind = "one"
            assert (p == 1).all(), name
        elif last[0] in ("time1", "time2"):
            kind = "normal"
            assert normal(p), name
        elif last[0] in ("label", "position", "time", "head"):
            kind = "embedding"
            assert normal(p, 0.03), name
        else:
            kind = "xavier"
            bound = (6 / sum(p.shape)) ** 0.5
            assert bound * 0.95 < float(p.abs().max()) <= bound, name
            assert normal(p, bound / 3**0.5), name
        seen.add(kind)
    assert seen == {"zero", "one", "normal", "embedding", "xavier"}


def test_fused_qkv_is_one_xavier_matrix(make_config):
    weight = fresh(make_config).backbone.blocks[0].qkv.weight.detach()
    assert float(weight.abs().max()) == pytest.approx((6 / (4 * 64)) ** 0.5, rel=0.01)


def test_codes_are_normal(make_config):
    system = fresh(make_config, "discrete", codes=500)
    assert normal(system.token_loss.output.weight)
    assert normal(system.backbone.token.weight, system.settings.embedding_std)


def test_parameters_differ_among_themselves(make_config):
    system = fresh(make_config)
    first, second = (system.backbone.blocks[i].qkv.weight.detach() for i in range(2))
    both = torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1]
    assert abs(float(both)) < 0.05
    assert not torch.equal(first, system.head.blocks[0].qkv.weight)


def test_start_depends_on_the_seed_and_nothing_else(make_config):
    torch.manual_seed(1)
    first = fresh(make_config).state_dict()
    torch.manual_seed(2)
    again, other = fresh(make_config).state_dict(), fresh(make_config, seed=1).state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    assert not torch.equal(first["head.mask_token"], other["head.mask_token"])


def test_start_of_a_parameter_depends_on_its_name_only(make_config):
    shallow, deep = fresh(make_config, depth=1), fresh(make_config, depth=4)
    assert torch.equal(shallow.backbone.blocks[0].fc1.weight, deep.backbone.blocks[0].fc1.weight)
    assert torch.equal(shallow.head.blocks[1].proj.weight, deep.head.blocks[1].proj.weight)


def test_a_module_that_nobody_initialises_is_an_error(make_system):
    system = make_system()
    system.backbone.norm = torch.nn.RMSNorm(32)
    with pytest.raises(TypeError, match="how backbone.norm.weight of a RMSNorm starts"):
        system.initialise(0)


def test_a_learned_token_that_nobody_initialises_is_an_error(make_system):
    system = make_system()
    system.head.another_token = torch.nn.Parameter(torch.empty(1, 32))
    with pytest.raises(TypeError, match="how head.another_token of a GlobalHead starts"):
        system.initialise(0)
