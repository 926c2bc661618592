"""Strategies of ours in templates of theirs: foreign models and loaders, refusals, and each hook's effect."""

from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("avalanche")
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive as TheirNaive
from avalanche.training.templates import SupervisedTemplate

from cl.backbones.mlp import Mlp
from cl.core import Setting, Source, UserError
from cl.hooks import Strategy
from cl.interop._quiet import quiet
from cl.interop.avalanche import Template, as_benchmark, as_model, as_plugin, train_in_template, with_our_hooks
from cl.testing import ToyNet, toy_stream
from strategies.der import Der
from strategies.ewc import Ewc
from strategies.gem import Gem
from strategies.joint import Joint
from strategies.lwf import Lwf
from strategies.replay import Replay
from strategies.si import Si

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(autouse=True)
def _silence():
    with quiet():
        yield


def foreign(num_outputs=6, width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_outputs))


def template(kind, model, plugins, lr=0.1, **options):
    given = {"criterion": nn.CrossEntropyLoss(), "train_mb_size": 16, "eval_mb_size": 100, "train_epochs": 3}
    return kind(
        model=model,
        optimizer=SGD(model.parameters(), lr=lr),
        plugins=plugins,
        evaluator=EvaluationPlugin(),
        **(given | options),
    )


def accuracy(made, experience):
    """On a test experience of theirs."""
    x, y = zip(*[(row[0], row[1]) for row in experience.dataset], strict=True)
    made.model.eval()
    return (made.model(torch.stack(x)).argmax(1) == torch.tensor(y)).float().mean().item()


@pytest.mark.parametrize(
    ("strategy", "setting"),
    [
        (lambda: Replay(capacity=100), Setting.CLASS_INCREMENTAL),
        (lambda: Gem(capacity=90), Setting.CLASS_INCREMENTAL),
        (lambda: Ewc(strength=20.0), Setting.DOMAIN_INCREMENTAL),
    ],
    ids=["replay", "gem", "ewc"],
)
def test_their_template_their_loader_a_foreign_model(strategy, setting):
    """Nothing is ours but the strategy; it must keep more of the first experiences than naive training does."""
    stream = toy_stream(setting)
    benchmark = as_benchmark(stream)
    kept = []
    for plugins in ([], [as_plugin(strategy())]):
        torch.manual_seed(1)
        made = template(TheirNaive, foreign(stream.info.num_outputs, 12), plugins, lr=0.2)
        for experience in benchmark.train_stream:
            made.train(experience, eval_streams=[])
        kept.append(sum(accuracy(made, benchmark.test_stream[j]) for j in (0, 1)) / 2)
    assert kept[1] > kept[0] + 0.05


@pytest.mark.parametrize("strategy", [Der(capacity=50), Lwf(strength=5.0)], ids=["der", "lwf"])
def test_penalties_join_the_loss_of_a_foreign_model(strategy):
    """From the second experience on; Der has rows to distil from after the first step."""
    added = []

    class Watch(Strategy):
        def on_gradients(self, state):
            label_loss = float(made.criterion().detach())
            added.append((state.experience.id, float(made.loss.detach()) - label_loss))

    benchmark = as_benchmark(toy_stream(Setting.CLASS_INCREMENTAL))
    made = template(SupervisedTemplate, foreign(), [as_plugin(strategy, Watch())], train_epochs=1)
    for experience in benchmark.train_stream:
        made.train(experience, eval_streams=[])
    assert abs(added[0][1]) < 1e-7, "nothing is stored yet"
    assert max(more for k, more in added if k == 2) > 1e-3


def test_beside_their_plugins():
    from avalanche.training.plugins import LwFPlugin, ReplayPlugin

    benchmark = as_benchmark(toy_stream(Setting.CLASS_INCREMENTAL))
    for theirs in (ReplayPlugin(mem_size=50), LwFPlugin()):
        plugin = as_plugin(Replay(capacity=50))
        made = template(SupervisedTemplate, foreign(), [theirs, plugin], train_epochs=1)
        for experience in benchmark.train_stream:
            made.train(experience, eval_streams=[])
        assert plugin.state.step == 36 and len(plugin.strategies[0].buffer) == 50


def test_several_strategies_compose_as_in_our_loop():
    from cl.config import TrainerConfig
    from cl.trainer import Trainer

    def both():
        return [Replay(capacity=50), Si(strength=0.5)]

    stream, backbone = toy_stream(Setting.TASK_INCREMENTAL), partial(Mlp, hidden=[16])
    ours = Trainer(stream, backbone, both(), optimizer=SGD, config=TrainerConfig(batch_size=16, device="cpu"))
    ours.run()
    made = train_in_template(stream, backbone, both(), optimizer=SGD, batch_size=16)
    for left, right in zip(ours.state.model.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert made.our_plugin.state.spent.forwards == ours.state.spent.forwards


class Noting(Strategy):
    """At every hook, where the run stands and what it is given; adds rows, so that not all are the stream's."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def _note(self, hook, state, *given):
        begun = (state.experience.id, len(state.data), state.progress) if state.has_begun else None
        counts = (state.step, state.step_rows, state.micro_step, state.micro_steps, state.tokens, state.epoch)
        planned = (state.total_steps, tuple(state.experience_steps), state.classes_seen)
        spent = (state.spent.forwards, state.spent.backwards)
        self.notes.append((self.name, hook, begun, counts, planned, spent, state.model.training, *given))

    def on_run_start(self, state):
        self._note("run starts", state)

    def on_experience_start(self, state):
        self._note("experience starts", state)

    def on_batch(self, state, batch):
        self._note("batch", state, batch.sample_ids.tolist())
        return batch.extended(batch.current()[:3], Source.REPLAY, self.name)

    def penalty(self, state, batch, output):
        self._note("penalty", state, len(batch), tuple(output.logits.shape))

    def on_gradients(self, state):
        self._note("gradients", state)

    def step(self, state, batch, update):
        self._note("step", state, len(batch))
        update()

    def on_step_end(self, state, batch, output):
        self._note("step ends", state, len(batch), len(output.logits))

    def on_experience_end(self, state):
        self._note("experience ends", state)


def test_hooks_are_called_and_read_the_state_as_in_our_loop():
    """Experiences of 192 rows in batches of 40, the last one of 32, for two epochs; their classes come back."""
    from cl.config import TrainerConfig
    from cl.trainer import Trainer

    stream, backbone = toy_stream(Setting.DOMAIN_INCREMENTAL), partial(Mlp, hidden=[8])
    ours, theirs = [], []
    config = TrainerConfig(batch_size=40, epochs=2, evaluate="seen", device="cpu")
    Trainer(stream, backbone, [Noting(name, ours) for name in "ab"], optimizer=SGD, config=config).run()
    two = [Noting(name, theirs) for name in "ab"]
    train_in_template(stream, backbone, two, optimizer=SGD, batch_size=40, epochs=2)
    assert len(theirs) == len(ours) == 2 * (1 + 3 * (2 + 10 * 5))
    for found, wanted in zip(theirs, ours, strict=True):
        assert found == wanted


def test_a_strategy_that_follows_measurements_needs_our_loop():
    class Follows(Strategy):
        needs_evaluation = True

    made = template(Template, foreign(), [as_plugin(Follows())])
    with pytest.raises(UserError, match="strategy test_plugin follows measurements, which no Avalanche template makes"):
        made.train(as_benchmark(toy_stream(Setting.CLASS_INCREMENTAL)).train_stream[0], eval_streams=[])


def test_user_criterion_is_kept_for_every_part():
    class Doubled(nn.CrossEntropyLoss):
        def forward(self, logits, targets):
            return 2 * super().forward(logits, targets)

    losses = []

    class Seen(Strategy):
        def on_step_end(self, state, batch, output):
            losses.append(float(made.loss.detach()))

    benchmark = as_benchmark(toy_stream(Setting.CLASS_INCREMENTAL))
    plugin = as_plugin(Replay(capacity=20), Seen())
    made = template(Template, foreign(), [plugin], criterion=Doubled(), train_epochs=1)
    made.train(benchmark.train_stream[0], eval_streams=[])
    last, output = plugin.batch, made
    assert losses[0] > 2 * 1.2 and last is None and output.clock.train_iterations == 12


def test_step_needs_our_template():
    made = template(TheirNaive, foreign(), [as_plugin(Si())])
    with pytest.raises(UserError, match=r"si acts at `step`.*with_our_hooks\(Naive\)"):
        made.train(as_benchmark(toy_stream(Setting.CLASS_INCREMENTAL)).train_stream[0], eval_streams=[])
    better = template(with_our_hooks(TheirNaive), foreign(), [as_plugin(Si(strength=1.0))], train_epochs=1)
    better.train(as_benchmark(toy_stream(Setting.CLASS_INCREMENTAL)).train_stream[0], eval_streams=[])
    assert sum(float(v.abs().sum()) for v in better.our_plugin.strategies[0].importance.values()) > 0


def test_one_plugin_per_template():
    made = template(Template, foreign(), [as_plugin(Replay()), as_plugin(Ewc())])
    with pytest.raises(UserError, match=r"as_plugin\(a, b\)"):
        made.train(as_benchmark(toy_stream(Setting.CLASS_INCREMENTAL)).train_stream[0], eval_streams=[])


def test_a_strategy_refuses_settings_as_it_does_at_home():
    class Picky(Strategy):
        settings = frozenset({Setting.TASK_INCREMENTAL})

    with pytest.raises(UserError, match="class_incremental"):
        train_in_template(toy_stream(Setting.CLASS_INCREMENTAL), ToyNet, [Picky()], optimizer=SGD)


def test_planned_experiences_are_all_there_is():
    benchmark = as_benchmark(toy_stream(Setting.DOMAIN_INCREMENTAL))
    made = template(Template, foreign(4), [as_plugin(Joint())], train_epochs=1)
    made.train(benchmark.train_stream[0], eval_streams=[])
    assert made.clock.train_iterations == 36, "all three experiences at once"
    with pytest.raises(UserError, match="plans 1 experiences"):
        made.train(benchmark.train_stream[1], eval_streams=[])


def test_eval_forward_predicts_in_place_of_the_model():
    class Oracle(Strategy):
        def eval_forward(self, state, batch):
            from cl.core import Output

            return Output(nn.functional.one_hot(batch.targets, 6).float())

    from cl.interop.avalanche import ContinualMetrics

    benchmark = as_benchmark(toy_stream(Setting.CLASS_INCREMENTAL))
    metrics = ContinualMetrics()
    made = template(Template, foreign(), [as_plugin(Oracle())], train_epochs=1)
    made.evaluator.metrics.append(metrics)
    made.train(benchmark.train_stream[0], eval_streams=[])
    made.eval(benchmark.test_stream)
    assert metrics.matrix.R == [[1.0, 1.0, 1.0]]


def test_heads_of_a_backbone_follow_task_labels():
    stream = toy_stream(Setting.TASK_INCREMENTAL)
    model = as_model(Mlp(stream.info, hidden=[8]), stream.info.num_heads)
    x = torch.randn(4, 1, 8, 8)
    mixed = model(x, torch.tensor([0, 1, 2, 0]))
    assert torch.allclose(mixed[1], model(x, 1)[1]) and torch.allclose(mixed[2], model(x, 2)[2])
    assert not torch.allclose(model(x, 0), model(x, 1))
