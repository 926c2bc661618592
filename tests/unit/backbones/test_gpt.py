"""The decoder against attention written out token by token, and against what packing promises."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.backbones.gpt import Gpt
from cl.backbones.mixers._rotary import rotary_angles, rotated
from cl.backbones.mixers.attention import Attention
from cl.core import Batch, Setting, StreamInfo, UserError
from cl.seeding import Seeds

SEPARATOR, VOCABULARY, CONTEXT = 10, 11, 24


def info(separator=SEPARATOR, context=CONTEXT):
    return StreamInfo(
        "text", Setting.CONTINUAL_PRETRAINING, (context,), VOCABULARY, 1, measure="loss", separator=separator
    )


def model(separator=SEPARATOR, **options):
    with Seeds(0).as_global("init"):
        made = Gpt(info(separator), **({"width": 16, "num_layers": 2, "num_heads": 2} | options))
    # weights of 0.02 hardly let one token feel another
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(10 if p.dim() > 1 else 1)
    return made.eval()


def batch(tokens):
    ids = torch.arange(len(tokens))
    return Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(ids), ids)


def packed(seed=0, num_rows=3):
    """Random tokens with a document border at 7 and at 15."""
    tokens = torch.randint(SEPARATOR, (num_rows, CONTEXT), generator=torch.Generator().manual_seed(seed))
    tokens[:, 7] = tokens[:, 15] = SEPARATOR
    return tokens


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_is_the_sum_written_out(groups, plain):
    torch.manual_seed(0)
    mixer = Attention(24, num_heads=4, num_kv_heads=groups).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = reset[1, 0] = reset[1, 7] = True
    read = partial(plain.attention, dict(mixer.named_parameters()), num_heads=4)
    y, _ = mixer(x, reset=reset)
    torch.testing.assert_close(y, plain.by_document(read, x, reset), atol=1e-12, rtol=1e-10)
    open_y, _ = mixer(x)
    torch.testing.assert_close(open_y, read(x), atol=1e-12, rtol=1e-10)
    assert not torch.allclose(y, open_y, atol=1e-3)


def test_rotary_angles_see_differences_only():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(at, before):
        turned = [rotated(x, *rotary_angles(place, 1, 8, 1e4, x.device)) for x, place in ((q, at), (k, before))]
        return (turned[0] * turned[1]).sum()

    assert score(9, 4) == pytest.approx(score(105, 100).item(), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 8).item(), abs=1e-3)


def test_nothing_leaks_from_the_future():
    network, tokens = model(), packed()
    other = tokens.clone()
    other[:, 18:] = (other[:, 18:] + 1) % SEPARATOR
    left, right = network(batch(tokens)).logits, network(batch(other)).logits
    assert torch.equal(left[:, :18], right[:, :18])
    assert not torch.allclose(left[:, 18:], right[:, 18:], atol=1e-3)


def test_nothing_leaks_from_one_document_into_the_next():
    """Packed documents give what each gives alone; the separator belongs to the document that it begins."""
    network, tokens = model(), packed()
    whole = network(batch(tokens)).logits
    for low, high in ((0, 7), (7, 15), (15, CONTEXT)):
        alone = network(batch(tokens[:, low:high])).logits
        torch.testing.assert_close(whole[:, low:high], alone, atol=1e-4, rtol=1e-4)
    other = tokens.clone()
    other[:, :7] = (other[:, :7] + 1) % SEPARATOR
    assert torch.equal(network(batch(other)).logits[:, 7:], whole[:, 7:])
    blind = model(separator=None)
    assert not torch.allclose(blind(batch(other)).logits[:, 7:], blind(batch(tokens)).logits[:, 7:], atol=1e-3)


@pytest.mark.parametrize("cuts", [[1] * CONTEXT, [5, 2, 8, 1, 8], [CONTEXT]])
@pytest.mark.parametrize("separator", [SEPARATOR, None])
def test_reading_in_pieces_gives_what_the_whole_gives(cuts, separator):
    network, tokens = model(separator, num_heads=4, num_kv_heads=2), packed()
    whole, state, pieces = network(batch(tokens)).logits, None, []
    for piece in tokens.split(cuts, 1):
        output = network.step(batch(piece), state)
        state = output.state
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)


def test_is_the_published_layout(plain):
    """h + attention(norm h), then h + SwiGLU(norm h), then the head on norm h; each document by itself."""
    network, tokens = model().double(), packed()
    weights, mixer = dict(network.named_parameters()), partial(plain.attention, num_heads=2)
    logits = plain.by_document(lambda document: plain.decoder(weights, document, mixer), tokens, tokens == SEPARATOR)
    output = network(batch(tokens))
    torch.testing.assert_close(output.logits, logits, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(output.hidden @ network.head.weight.T, logits, atol=1e-10, rtol=1e-10)


def test_number_of_weights():
    """The size of the card's toy: 12 D^2 a block, embedding and head."""
    width, layers = 96, 3
    made = Gpt(StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (96,), 257, 1))
    count = sum(p.numel() for p in made.parameters())
    assert count == 2 * 257 * width + layers * (4 * width**2 + 3 * width * 256 + 2 * width) + width
    tied = model(is_tied=True)
    assert tied.head.weight is tied.embedding.weight


def test_initial_loss_is_that_of_a_uniform_guess():
    with Seeds(0).as_global("init"):
        made = Gpt(info())
    rows = batch(packed(num_rows=20))
    loss = F.cross_entropy(made(rows).logits.flatten(0, 1), rows.targets.flatten())
    assert loss.item() == pytest.approx(math.log(VOCABULARY), abs=0.05)


def test_checkpointing_changes_memory_only():
    losses, gradients = [], []
    for is_checkpointed in (False, True):
        network = model(is_checkpointed=is_checkpointed).train()
        rows = batch(packed())
        loss = F.cross_entropy(network(rows).logits.flatten(0, 1), rows.targets.flatten())
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in network.parameters()])
    assert losses[0] == losses[1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_dropout_acts_in_training_only():
    network = model(dropout=0.3)
    rows = batch(packed())
    assert torch.equal(network(rows).logits, network(rows).logits)
    network.train()
    assert not torch.equal(network(rows).logits, network(rows).logits)


@pytest.mark.parametrize(
    ("blocks", "num_layers", "names"),
    [
        ("attention", None, "aaa"),
        ("attention", 2, "aa"),
        ("attention(window=4)", 1, "w"),
        ("attention(window=4) + attention", None, "wa"),
        ("attention(window=4) + attention", 3, "waw"),
        ("2x[attention(window=4)] + attention", None, "wwa"),
        ("2x[2x attention(window=4) + attention]", 6, "wwawwa"),
        ("1x[attention]", None, "a"),
    ],
)
def test_words_and_depth(blocks, num_layers, names):
    network = model(blocks=blocks, num_layers=num_layers)
    assert "".join("a" if block.mixer.window is None else "w" for block in network.blocks) == names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 15}, "backbone.width is 15 for backbone.num_heads=2"),
        ({"width": 6}, "multiple of twice the heads"),
        ({"num_heads": 4, "num_kv_heads": 3}, "backbone.num_kv_heads is 3"),
        ({"num_layers": 0}, "backbone.num_layers is 0"),
        ({"blocks": "mamba"}, "backbone.blocks names 'mamba'; it must be one of attention, "),
        ({"blocks": "attention(breadth=3)"}, "gives attention the option 'breadth'; its options are num_heads"),
        ({"blocks": "attention(attention)"}, "gives attention 1 blocks"),
        ({"blocks": "attention +"}, "at its end it must have a name"),
        ({"blocks": "attention)"}, "at ')' it must have + or the end"),
        ({"blocks": "attention(window=4"}, "at its end it must have ,"),
        ({"blocks": "attention; attention"}, "at '; attention'"),
        ({"blocks": "0x[attention]"}, "a count of at least 1"),
        ({"blocks": 3}, "backbone.blocks is 3"),
        ({"blocks": "attention(window=4, window=5)"}, "which gives attention the option 'window' twice"),
        ({"blocks": "attention(window=)"}, "at ')' it must have a value"),
        ({"blocks": "1000000000x[attention]"}, "repeats 1 blocks 1000000000 times; it must name at most 1000"),
        ({"blocks": "50x[50x[attention]]"}, "repeats 50 blocks 50 times"),
        (
            {"blocks": "[" * 3000 + "attention" + "]" * 3000},
            "has 3000 brackets inside each other; it must have at most",
        ),
        ({"blocks": "attention(num_heads=0)"}, "backbone.num_heads is 0; it must be an integer of at least 1"),
        ({"blocks": "attention(num_kv_heads=0)"}, "backbone.num_kv_heads is 0"),
        ({"blocks": "attention(dropout=1.5)"}, "backbone.dropout is 1.5; it must be a number from 0 to below 1"),
        ({"blocks": "attention(window=wide)"}, "window of attention is 'wide'; it must be an integer or none"),
        ({"blocks": "attention(window=[4])"}, "window of attention is [4]; it must be an integer or none"),
        ({"blocks": "nonlinear_rnn(cell=3)"}, "cell of nonlinear_rnn is 3; it must be a word"),
        ({"blocks": "2x[attention]", "num_layers": 3}, "backbone.num_layers is 3, but"),
        ({"blocks": "attention + attention", "num_layers": 1}, "names 2 blocks"),
        ({"blocks": "attention(window=0)"}, "window of attention is 0"),
        ({"mlp": "relu"}, "backbone.mlp names 'relu'; it must be one of"),
        ({"mlp": "moe(experts=4, top=5)"}, "top of moe is 5"),
        ({"mlp": "moe(experts=0)"}, "backbone.mlp experts is 0"),
        ({"mlp": "moe(balance=-1)"}, "balance of moe is -1"),
        ({"mlp": "moe + moe"}, "it must name one part"),
        ({"read": "columns"}, "backbone.read is 'columns'; it must be one of rows, pixels"),
        ({"dropout": 1.0}, "backbone.dropout is 1.0"),
        ({"rope_base": 0}, "backbone.rope_base is 0"),
    ],
)
def test_bad_values_are_one_sentence(options, words):
    with pytest.raises(UserError) as error:
        model(**options)
    assert words in str(error.value)


def images(setting=Setting.CLASS_INCREMENTAL, shape=(2, 4, 3)):
    return StreamInfo("digits", setting, shape, 5, 2, 2 if setting == Setting.TASK_INCREMENTAL else 1)


def rows(setting=Setting.CLASS_INCREMENTAL, shape=(2, 4, 3), num_rows=3):
    ids = torch.arange(num_rows)
    inputs = torch.rand(num_rows, *shape, generator=torch.Generator().manual_seed(0))
    return Batch(inputs, ids, ids * 0, ids, ids % 2 if setting == Setting.TASK_INCREMENTAL else None)


@pytest.mark.parametrize(("read", "steps", "features"), [("rows", 4, 6), ("pixels", 12, 2)])
def test_images_are_read_from_the_top_left(read, steps, features):
    """The same pixels as a sequence of vectors give the same answer, and the last step predicts."""
    batch_ = rows()
    image = batch_.inputs
    vectors = torch.stack(
        [image[:, :, y].flatten(1) for y in range(4)]
        if read == "rows"
        else [image[:, :, y, x] for y in range(4) for x in range(3)],
        dim=1,
    )
    assert vectors.shape == (3, steps, features)
    made = [Gpt(images(shape=shape), width=16, num_heads=2, read=read) for shape in ((2, 4, 3), (steps, features))]
    made[1].load_state_dict(made[0].state_dict())
    seen = Batch(vectors, batch_.targets, batch_.experience_id, batch_.sample_ids)
    assert torch.equal(made[0](batch_).logits, made[1](seen).logits)
    hidden, *_ = made[1].read(made[1].embed(vectors))
    torch.testing.assert_close(made[1](seen).logits, made[1].head(hidden[:, -1]))


def test_a_head_per_task():
    network = Gpt(images(Setting.TASK_INCREMENTAL), width=16, num_heads=2)
    batch_ = rows(Setting.TASK_INCREMENTAL)
    output = network(batch_)
    expected = torch.stack([network.head.heads[i % 2](output.hidden[i]) for i in range(3)])
    torch.testing.assert_close(output.logits, expected)


def test_images_are_read_in_pieces():
    network, batch_ = Gpt(images(shape=(7, 3)), width=16, num_heads=2).eval(), rows(shape=(7, 3))
    first = Batch(batch_.inputs[:, :4], batch_.targets, batch_.experience_id, batch_.sample_ids)
    rest = Batch(batch_.inputs[:, 4:], batch_.targets, batch_.experience_id, batch_.sample_ids)
    output = network.step(rest, network.step(first, network.init_state(3)).state)
    torch.testing.assert_close(output.logits, network(batch_).logits)


def test_refuses_what_it_cannot_read():
    for setting, shape, words in (
        (Setting.CONTINUAL_PRETRAINING, (1, 8, 8), "reads rows of tokens"),
        (Setting.CLASS_INCREMENTAL, (8,), "reads rows of tokens, images"),
    ):
        with pytest.raises(UserError, match=words):
            Gpt(images(setting, shape))
    with pytest.raises(UserError, match="is_tied"):
        Gpt(images(), is_tied=True)


def test_adapters_are_low_rank_changes_of_the_blocks_weights():
    """The logits are those of a plain decoder whose weights are W + s B A, by hand; at first B is zero."""
    pytest.importorskip("peft")
    plain, adapted = model(), model(lora={"rank": 2, "alpha": 6})
    tokens = batch(packed())
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name} and len(trained) == 2 * 7 * 2
    layers = {name: layer for name, layer in adapted.named_modules() if hasattr(layer, "lora_A")}
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight.zero_()
        torch.testing.assert_close(adapted(tokens).logits, plain(tokens).logits)
        for name, layer in layers.items():
            layer.lora_B["default"].weight.normal_()
            change = 6 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            plain.get_parameter(f"{name}.weight").add_(change)
        torch.testing.assert_close(adapted(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rang": 2}, "backbone.lora has no key 'rang'; its keys are rank, alpha, dropout, target_modules"),
        ({"rank": 0}, "backbone.lora.rank is 0"),
        ({"target_modules": ["nowhere"]}, "backbone.lora.target_modules names 'nowhere', no layer of this model"),
        ({"target_modules": ["dropout"]}, "backbone.lora cannot be put on this model"),
    ],
)
def test_wrong_adapters_are_one_sentence(lora, words):
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=words):
        model(lora=lora)


def test_adapters_are_for_text():
    pytest.importorskip("peft")
    pixels = StreamInfo("images", Setting.DOMAIN_INCREMENTAL, (4, 4), 2, 1)
    with pytest.raises(UserError, match="freezes the head"):
        Gpt(pixels, width=16, num_heads=2, lora={})
