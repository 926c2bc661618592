"""Rows find their head, and only the heads that were asked learn."""

import pytest
import torch
import torch.nn.functional as F

from cl.backbones import Backbone, MultiHead
from cl.backbones._heads import channels_last
from cl.backbones.convnet import Convnet
from cl.core import Batch, Setting, StreamInfo

TASKS = torch.tensor([2, 0, 2, 1, 0, 2])


class Identity(Backbone):
    def features(self, inputs):
        return inputs


def info(num_heads):
    return StreamInfo("x", Setting.TASK_INCREMENTAL, (4,), 3, num_heads, num_heads=num_heads)


def batch(tasks=TASKS):
    rows = torch.arange(len(TASKS))
    return Batch(torch.rand(len(TASKS), 4), rows % 3, rows, rows, tasks)


def test_mixed_batches_equal_a_loop_over_rows():
    head, hidden = MultiHead(4, 3, num_heads=4), torch.rand(6, 4)
    together = head(hidden, TASKS)
    alone = torch.stack(
        [F.linear(h, head.heads[t].weight, head.heads[t].bias) for h, t in zip(hidden, TASKS, strict=True)]
    )
    torch.testing.assert_close(together, alone)


def test_gradients_of_mixed_batches_equal_a_loop_over_rows():
    head, hidden = MultiHead(4, 3, num_heads=4), torch.rand(6, 4, requires_grad=True)
    weights = [h.weight for h in list(head.heads)[:3]]
    together = torch.autograd.grad(head(hidden, TASKS).square().sum(), [hidden, *weights])
    alone = sum(head.heads[t](h).square().sum() for h, t in zip(hidden, TASKS.tolist(), strict=True))
    for ours, expected in zip(together, torch.autograd.grad(alone, [hidden, *weights]), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("tasks", [torch.full((6,), 1), TASKS])
def test_heads_nobody_asked_for_get_no_gradient_at_all(tasks):
    head = MultiHead(4, 3, num_heads=4)
    head(torch.rand(6, 4), tasks).sum().backward()
    for task, one in enumerate(head.heads):
        assert (one.weight.grad is not None) == (task in tasks.tolist())
        assert (one.bias.grad is not None) == (task in tasks.tolist())


def test_momentum_and_decay_leave_an_idle_head_alone():
    head = MultiHead(4, 3, num_heads=2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for task in (0, 1, 1):
        before = [p.clone() for p in head.heads[0].parameters()]
        optimizer.zero_grad(set_to_none=True)
        head(torch.rand(6, 4), torch.full((6,), task)).square().sum().backward()
        optimizer.step()
        moved = any(not torch.equal(a, b) for a, b in zip(before, head.heads[0].parameters(), strict=True))
        assert moved == (task == 0)


def test_backbone_hands_hidden_to_the_head_its_setting_needs():
    single, multi = Identity(info(1), 4), Identity(info(3), 4)
    rows = batch()
    assert torch.equal(multi(rows).hidden, rows.inputs)
    torch.testing.assert_close(single(batch(tasks=None)).logits.shape, torch.Size([6, 3]))
    torch.testing.assert_close(multi(rows).logits, multi.head(rows.inputs, rows.task_id))
    assert len(multi.head.heads) == 3


def test_rows_without_a_known_task_are_refused():
    backbone = Identity(info(3), 4)
    with pytest.raises(ValueError, match="needs rows with a task_id"):
        backbone(batch(tasks=None))
    for tasks in (torch.full((6,), 3), torch.full((6,), -1)):
        with pytest.raises(ValueError, match="this backbone has 0 to 2"):
            backbone(batch(tasks))


@pytest.mark.parametrize("num_heads", [1, 3])
def test_weight_norm_does_not_see_lengths(num_heads):
    """The product with weights of length 1, by hand; and neither the logits nor the training can tell longer ones."""
    setting = Setting.CLASS_INCREMENTAL if num_heads == 1 else Setting.TASK_INCREMENTAL
    backbone = Convnet(StreamInfo("rows", setting, (1, 8, 8), 4, num_heads, num_heads=num_heads), head="weight_norm")
    rows = torch.arange(6)
    batch = Batch(torch.rand(6, 1, 8, 8), rows % 4, rows, rows, rows % 3 if num_heads > 1 else None)
    output = backbone(batch)
    heads = [backbone.head] if num_heads == 1 else list(backbone.head.heads)
    for row in range(6):
        weights = heads[row % num_heads].weight
        for c in range(4):
            length = sum(w**2 for w in weights[c].tolist()) ** 0.5
            wanted = sum(h * w for h, w in zip(output.hidden[row].tolist(), weights[c].tolist(), strict=True)) / length
            assert output.logits[row, c].item() == pytest.approx(wanted, abs=1e-5)
    for head in heads:
        head.weight.data *= torch.tensor([[0.1], [1.0], [7.0], [100.0]])
    torch.testing.assert_close(backbone(batch).logits, output.logits)
    assert not any("bias" in name for name, _ in backbone.head.named_parameters())


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (2, 3, 5, 7), (1, 4, 1, 1)])
def test_channels_last_are_the_same_maps(shape):
    maps = torch.rand(shape, requires_grad=True)
    found = channels_last(maps)
    assert torch.equal(found, maps) and found.is_contiguous(memory_format=torch.channels_last)
    assert found.stride(1) == 1
    found.square().sum().backward()
    torch.testing.assert_close(maps.grad, 2 * maps.detach())
