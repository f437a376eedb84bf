"""Blocks and backbone against torch's own layers, causality, packed rows, and the dtype of work."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from heptapod_fast import ops
from heptapod_fast.model.dropout import Dropout
from heptapod_fast.model.transformer import Backbone, Block, Packing, Stream
from heptapod_fast.ops import CAUSAL, FULL
from heptapod_fast.ops.dispatch import Operators
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import KVCache
from tests.running import dense

WIDTH, HEADS = 16, 2
REFERENCE = Operators({"attention": "reference"})


def fill(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def block():
    return fill(Block(WIDTH, HEADS, REFERENCE))


def backbone(channels=0, vocabulary=7, tokens=6):
    return fill(
        Backbone(
            depth=2,
            width=WIDTH,
            heads=HEADS,
            num_classes=3,
            num_tokens=tokens,
            channels=channels,
            vocabulary=vocabulary,
            operators=REFERENCE,
        )
    )


def torchs_own(ours):
    """nn.TransformerEncoderLayer with the same weights: pre-norm, erf GELU, eps 1e-6."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    )
    pairs = (
        (layer.self_attn.in_proj_weight, ours.qkv.weight),
        (layer.self_attn.in_proj_bias, ours.qkv.bias),
    )
    modules = (
        (layer.self_attn.out_proj, ours.proj),
        (layer.linear1, ours.fc1),
        (layer.linear2, ours.fc2),
        (layer.norm1, ours.norm1),
        (layer.norm2, ours.norm2),
    )
    with torch.no_grad():
        for theirs, own in pairs:
            theirs.copy_(own)
        for theirs, own in modules:
            theirs.load_state_dict(own.state_dict())
    return layer


@pytest.mark.parametrize("causal", [False, True])
def test_block_is_the_standard_pre_norm_block(causal):
    ours, x = block(), torch.randn(3, 6, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(6) if causal else None
    expected = torchs_own(ours).train()(x, src_mask=mask)
    visible = CAUSAL if causal else FULL
    torch.testing.assert_close(dense(ours, x, visible=visible), expected, rtol=1e-4, atol=1e-4)


def dropout_of(batch, length, p=0.3, sites=Block.SITES):
    return Dropout.draw(p, "d", torch.arange(batch), 0, sites, length, Rng(0))


@pytest.mark.parametrize("dropped", [False, True])
def test_gathered_rows_equal_the_full_block(dropped):
    module, sequence = block(), torch.tensor([2, 0, 0, 1, 2])
    element = torch.tensor([4, 0, 3, 1, 0])
    whole = packed = Block.NO_MASKS
    if dropped:
        dropout = dropout_of(3, 5)
        whole = dropout.sites(0, Block.SITES)
        packed = dropout.packed(sequence, element).sites(0, Block.SITES)
    results = []
    for gathers in (True, False):
        x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
        if gathers:
            out = module(Stream(x), masks=packed, packing=Packing(sequence, element)).value()
        else:
            out = dense(module, x, masks=whole)[sequence, element]
        grads = torch.autograd.grad((out * out.detach().cos()).sum(), (x, *module.parameters()))
        results.append((out, *grads))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dropout_acts_on_its_three_places():
    """After the projection, after GELU, after the second layer: a block written out."""
    module, x = block(), torch.randn(3, 5, WIDTH)
    masks = dropout_of(3, 5).sites(0, Block.SITES)
    after_projection, after_gelu, after_mlp = masks
    h = x + ops.dropout(module.proj(module.attend(module.norm1(x), FULL)), after_projection)
    hidden = ops.dropout(nn.functional.gelu(module.fc1(module.norm2(h))), after_gelu)
    expected = h + ops.dropout(module.fc2(hidden), after_mlp)
    torch.testing.assert_close(dense(module, x, masks=masks), expected, rtol=1e-4, atol=1e-5)


def test_every_block_of_the_backbone_gets_masks_of_its_own():
    module = backbone()
    dropout = dropout_of(1, 4, sites=module.dropout_sites)
    handed = []
    for one in module.blocks:
        one.register_forward_pre_hook(lambda module, inputs: handed.append(inputs[2]))
    module(torch.randn(1, 4, WIDTH), dropout)
    keys = [tuple(mask.key_P2.flatten().tolist()) for masks in handed for mask in masks]
    assert keys == [tuple(key) for key in dropout.key_PS2[0].tolist()]
    assert len(set(keys)) == module.dropout_sites == 6


def test_the_stream_between_blocks_holds_no_parameter():
    """Sharding may free a block's parameters as soon as it is done."""
    module = backbone()
    streams = []
    for one in module.blocks:
        one.register_forward_hook(lambda module, inputs, output: streams.append(output))
    module(torch.randn(1, 4, WIDTH))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    assert len(streams) == 2
    for stream in streams:
        parts = [part for part in stream if torch.is_tensor(part)]
        assert len(parts) == 3
        assert not any(part.untyped_storage().data_ptr() in parameters for part in parts)


def test_torch_compile_sees_one_block():
    """Blocks of equal shapes are one graph: a second one, and other masks, compile nothing."""
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def run(block, x, masks):
        return block(Stream(x), CAUSAL, masks).value()

    module, x = backbone(), torch.randn(2, 4, WIDTH)
    dropout = dropout_of(2, 4, sites=module.dropout_sites)
    for number, one in enumerate(module.blocks):
        masks = dropout.sites(Block.SITES * number, Block.SITES)
        run(one, x, masks)
    torch._dynamo.reset()
    assert counter.frame_count == 1


def test_backbone_is_causal():
    module, x = backbone(), torch.randn(1, 6, WIDTH, requires_grad=True)
    h = module(x)
    for t in range(6):
        grad = torch.autograd.grad(h[0, t].square().sum(), x, retain_graph=True)[0][0]
        assert (grad[t + 1 :] == 0).all() and (grad[: t + 1].abs().sum(1) > 0).all()


@pytest.mark.parametrize("parts", [[1] * 6, [2, 3, 1], [6], [1, 5]])
def test_cache_equals_the_whole_sequence(parts):
    module, x = backbone(), torch.randn(2, 6, WIDTH)
    cache, out, start = KVCache(len(module.blocks), 6), [], 0
    for count in parts:
        out.append(module(x[:, start : start + count], cache=cache))
        cache.advance(count)
        start += count
    torch.testing.assert_close(torch.cat(out, 1), module(x), rtol=1e-4, atol=1e-5)


def test_embeddings_are_the_sums_they_should_be():
    module = backbone()
    labels, tokens = torch.tensor([2, 0]), torch.tensor([[1, 6], [3, 3]])
    positions = torch.tensor([[5, 0], [2, 4]])
    start = module.embed_start(labels)[:, 0]
    torch.testing.assert_close(start, module.label.weight[labels] + module.time.weight[0])
    targeted = module.embed_start(labels, positions[:, 0])[:, 0]
    torch.testing.assert_close(targeted, start + module.position.weight[positions[:, 0]])
    embedded = module.embed_tokens(tokens, positions, 3)
    for b in range(2):
        for i in range(2):
            expected = (
                module.token.weight[tokens[b, i]]
                + module.time.weight[3 + i]
                + module.position.weight[positions[b, i]]
            )
            torch.testing.assert_close(embedded[b, i], expected)
    assert torch.equal(embedded, module.embed_tokens(tokens, positions, torch.tensor([3])))


def test_vectors_are_projected():
    module, vectors = backbone(channels=4), torch.randn(1, 2, 4)
    embedded = module.embed_tokens(vectors, torch.tensor([[0, 1]]), 1)
    expected = (
        vectors @ module.token.weight.t()
        + module.token.bias
        + module.time.weight[1:3]
        + module.position.weight[:2]
    )
    torch.testing.assert_close(embedded, expected)


def test_tables_have_the_sizes_of_the_method():
    shapes = {
        name: tuple(p.shape) for name, p in backbone().named_parameters() if "blocks" not in name
    }
    assert shapes == {
        "token.weight": (7, WIDTH),
        "label.weight": (3, WIDTH),
        "position.weight": (6, WIDTH),
        "time.weight": (6, WIDTH),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    module = block()
    assert module.norm1.eps == module.norm2.eps == 1e-6
    assert sum(p.numel() for p in module.parameters()) == 12 * WIDTH**2 + 13 * WIDTH


def test_bf16_works_on_float32_masters():
    module = backbone()
    labels = torch.tensor([0, 1])
    module.dtype = torch.bfloat16
    x = module.embed_start(labels)
    h = module(x)
    assert x.dtype == h.dtype == torch.bfloat16
    h.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.blocks.parameters())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_elements_without_keys_and_values(count):
    """In float64 what `forward` lets out, each sequence its own elements in its own order."""
    module = block().double()
    generator = torch.Generator().manual_seed(5)
    parts = [torch.randn(3, 5, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    stream = Stream(*parts, torch.randn(WIDTH, generator=generator, dtype=torch.float64))
    element = torch.stack([torch.randperm(5, generator=generator)[:count] for _ in range(3)])
    sequence = torch.arange(3).repeat_interleave(count)
    expected = module(stream, packing=Packing(sequence, element.flatten())).value()
    found = module.few(stream, element).value()
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-10, atol=1e-10)
