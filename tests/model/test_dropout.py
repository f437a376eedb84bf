"""The masks of a forward pass: one per site and sequence, the same for packed rows."""

import pytest
import torch

from heptapod_fast.model.dropout import NO_DROPOUT, Dropout, drop_labels
from heptapod_fast.ops import dropout
from heptapod_fast.rng import Rng


def drawn(index, slot=0, sites=4, length=6, p=0.5, seed=0):
    return Dropout.draw(p, "d", torch.tensor(index), slot, sites, length, Rng(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_get_the_masks_of_the_whole_sequences(dtype):
    masks = drawn([0, 1, 2, 3, 4])
    x = torch.randn(5, 6, 10).to(dtype)
    sequence, element = torch.tensor([4, 0, 0, 3]), torch.tensor([5, 1, 2, 0])
    packed = masks.packed(sequence, element)
    for site in range(4):
        (of_all,), (of_rows,) = masks.sites(site, 1), packed.sites(site, 1)
        whole = dropout(x, of_all)
        assert whole.dtype == dtype
        assert torch.equal(dropout(x[sequence, element], of_rows), whole[sequence, element])


def test_every_site_of_every_sequence_has_a_key_of_its_own():
    keys = drawn([0, 1, 2], sites=5).key_PS2
    assert keys.shape == (3, 5, 2)
    assert len(keys.flatten(0, 1).unique(dim=0)) == 15


def test_sites_are_a_run_of_the_table():
    masks = drawn([0, 1], sites=5)
    second, third = masks.sites(1, 2)
    assert torch.equal(second.key_P2, masks.key_PS2[:, 1])
    assert torch.equal(third.key_P2, masks.key_PS2[:, 2])
    assert second.p == 0.5


def test_keys_belong_to_the_sample_its_slot_and_the_seed():
    keys = drawn([7, 3]).key_PS2
    assert torch.equal(drawn([3]).key_PS2[0], keys[1])
    assert not torch.equal(drawn([3], slot=1).key_PS2[0], keys[1])
    assert not torch.equal(drawn([3], seed=1).key_PS2[0], keys[1])


def test_nothing_is_dropped_at_zero():
    none = drawn([0, 1], p=0.0)
    assert none is NO_DROPOUT
    assert none.sites(3, 2) == (None, None)
    assert none.packed(torch.tensor([0]), torch.tensor([0])) is none


def test_the_last_sites_are_the_last():
    masks = Dropout.draw(0.5, "here", torch.arange(3), 0, 7, 5, Rng(1))
    sequence_R, element_R = torch.tensor([2, 0, 0]), torch.tensor([4, 1, 3])
    whole = masks.packed(sequence_R, element_R).sites(4, 3)
    found = masks.last(3).packed(sequence_R, element_R).sites(0, 3)
    for a, b in zip(whole, found, strict=True):
        assert torch.equal(a.keep(3, 16), b.keep(3, 16))
    assert NO_DROPOUT.last(3).sites(0, 3) == (None,) * 3


def test_labels_are_dropped_by_the_sample():
    index = torch.arange(20_000)
    labels = torch.full_like(index, 2)
    dropped = drop_labels(labels, index, 0.25, 9, Rng(3))
    assert set(dropped.tolist()) == {2, 9}
    share = float((dropped == 9).double().mean())
    assert share == pytest.approx(0.25, abs=0.02)  # six deviations
    part = drop_labels(labels[:100], index[700:800], 0.25, 9, Rng(3))
    assert torch.equal(dropped[700:800], part)
    assert not torch.equal(dropped, drop_labels(labels, index, 0.25, 9, Rng(4)))
    assert torch.equal(drop_labels(labels, index, 0.0, 9, Rng(3)), labels)
