"""Landmark attention against the grouped softmax written out, and the tokens that are put in for it."""

import math

import torch

from cl.backbones.gpt import Gpt
from cl.backbones.landmark import Landmark
from cl.backbones.mixers.landmark import Landmark as LandmarkMixer
from cl.core import Batch, Setting, StreamInfo


def test_landmark_attention_is_the_grouped_softmax_written_out():
    torch.manual_seed(0)
    mixer = LandmarkMixer(8, num_heads=2, block=3, rope_base=None).double()
    x = torch.randn(1, 11, 8, dtype=torch.float64)
    q, k, v = (layer(x)[0].detach() for layer in (mixer.query, mixer.key, mixer.value))
    wanted = torch.zeros(11, 8, dtype=torch.float64)
    for t in range(11):
        for h in (slice(0, 4), slice(4, 8)):
            score = [float(q[t, h] @ k[s, h] / 2) for s in range(11)]
            own = [s for s in range(t // 4 * 4, t + 1) if s % 4 != 3]
            marks = [4 * b + 3 for b in range(t // 4)]
            total = sum(math.exp(score[s]) for s in own + marks)
            for s in own:
                wanted[t, h] += math.exp(score[s]) / total * v[s, h]
            for mark in marks:
                inside = range(mark - 3, mark)
                block = sum(math.exp(score[s]) for s in inside)
                for s in inside:
                    wanted[t, h] += math.exp(score[mark]) / total * math.exp(score[s]) / block * v[s, h]
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0][0], mixer.out(wanted), atol=1e-12, rtol=0)


def test_landmark_weights_sum_to_one_and_landmarks_carry_none():
    torch.manual_seed(0)
    mixer = LandmarkMixer(8, num_heads=2, block=3).double()
    q, k = torch.randn(2, 1, 2, 11, 4, dtype=torch.float64)
    place = torch.arange(11)[None]
    weight = mixer._weights(q, k, torch.zeros(1, 11, dtype=torch.int64), place)
    torch.testing.assert_close(weight.sum(-1), torch.ones(1, 2, 11, dtype=torch.float64))
    assert (weight[..., 3::4] == 0).all()


def test_retrieval_follows_the_best_landmarks_only():
    torch.manual_seed(0)
    options = {"num_heads": 2, "block": 2, "rope_base": None}
    everything, best = LandmarkMixer(8, **options).double(), LandmarkMixer(8, **options, top=1).double()
    best.load_state_dict(everything.state_dict())
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    assert torch.equal(best.train()(x)[0], everything(x)[0]), "training sees all"
    q, k = torch.randn(2, 1, 2, 12, 4, dtype=torch.float64)
    weight = best.eval()._weights(q, k, torch.zeros(1, 12, dtype=torch.int64), torch.arange(12)[None])
    blocks = (weight.unflatten(-1, (4, 3)).sum(-1) > 0).sum(-1)
    assert blocks[..., -1].tolist() == [[2, 2]], "its own block, and one more"
    score = (q @ k.transpose(2, 3))[..., -1, 2:9:3]
    chosen = (weight[..., -1, :9].unflatten(-1, (3, 3)).sum(-1)).argmax(-1)
    assert torch.equal(chosen, score.argmax(-1))


def test_landmark_puts_a_token_behind_every_block():
    torch.manual_seed(0)
    info = StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (12,), 11, 1, measure="loss")
    net = Landmark(info, width=8, num_heads=2, num_layers=2, block=5).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    tokens, ids = torch.randint(11, (2, 12)), torch.arange(2)
    x, mark = net.embedding(tokens), net.landmark.weight.expand(2, 1, -1)
    read = Gpt.read(net, torch.cat((x[:, :5], mark, x[:, 5:10], mark, x[:, 10:]), 1))[0]
    wanted = net.head(torch.cat((read[:, :5], read[:, 6:11], read[:, 12:]), 1))
    torch.testing.assert_close(net(Batch(tokens, tokens, ids, ids)).logits, wanted, atol=1e-12, rtol=0)
