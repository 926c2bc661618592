"""Two processes against one: the same losses, R, weights and buffers, and checkpoints that go on in the other."""

import os
import runpy
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from cl.core import IGNORED, Batch, Setting, Source, UserError
from cl.distributed import World
from cl.seeding import derive_seed, global_states
from cl.setup import check_world
from cl.state import Output, cross_entropy
from cl.testing import equal
from cl.trainer import Trainer
from strategies.der import Der
from strategies.derpp import Derpp
from strategies.gdumb import Gdumb
from strategies.lwf import Lwf
from strategies.naive import Naive
from strategies.replay import Replay

SCRIPT = Path(__file__).with_name("ranks.py")
ROOT = Path(__file__).resolve().parents[3]
ranks = runpy.run_path(str(SCRIPT))
run, STOP, TEXT, IMAGES, made = (ranks[name] for name in ("run", "STOP", "TEXT", "IMAGES", "made"))
Overflow, Break, Given, Blocks, stream_of = (ranks[n] for n in ("Overflow", "Break", "Given", "Blocks", "stream_of"))
CASES = {f"{name}-{setting}-{wrapper}": (kind, setting) for name, kind, setting, wrapper in ranks["cases"]()}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes computed, and the run that one left behind for them."""
    folder = tmp_path_factory.mktemp("ranks")
    for wrapper in ("ddp", "fsdp"):
        run([Replay(capacity=40)], TEXT, "none", folder / f"one-{wrapper}", stop_at=STOP)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(SCRIPT), str(folder)]
    both = [
        subprocess.Popen(command, env=env | {"RANK": str(k), "LOCAL_RANK": str(k)}, stderr=subprocess.PIPE, text=True)
        for k in range(2)
    ]
    errors = [process.communicate(timeout=900)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(errors)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"found-{k}.pt", weights_only=False) for k in range(2)]


def assert_same_run(got, wanted, tolerance=1e-5):
    assert [step for step, _ in got["losses"]] == [step for step, _ in wanted["losses"]]
    for (step, one), (_, other) in zip(got["losses"], wanted["losses"], strict=True):
        assert one == pytest.approx(other, abs=tolerance), step
    assert torch.allclose(torch.tensor(got["R"]), torch.tensor(wanted["R"]), atol=1e-4)
    for name, value in wanted["weights"].items():
        assert torch.allclose(got["weights"][name], value, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(case, found):
    kind, setting = CASES[case]
    alone = run(made(kind), setting)
    first, second = (one[case] for one in found)
    assert_same_run(first, alone)
    assert first["counted"] == alone["counted"]
    assert equal(first["weights"], second["weights"])
    assert equal(first["strategies"], second["strategies"]), "checkpoints hold those of the first process"
    assert second["losses"] == [], "observers are told by the first process only"
    assert first["told"] == second["told"] == []


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ranks["GERE"])
def test_imitation_pools_over_processes(name, wrapper, found):
    alone, both = run(ranks["made_gere"](name), TEXT), found[0][f"gere-{name}-{wrapper}"]
    assert_same_run(both, alone)
    assert both["counted"] == alone["counted"]


@pytest.mark.slow
def test_buffers_are_the_same_everywhere(found):
    first, second = (one["replay-continual_pretraining-ddp"]["strategies"] for one in found)
    assert equal(first, second)
    assert equal(first, run(made(Replay), TEXT)["strategies"])


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ranks["BACKBONES"])
def test_backbones_of_many_parts(name, wrapper, found):
    alone, (first, second) = (
        run([Naive()], TEXT, backbone=ranks["BACKBONES"][name]),
        (one[f"{name}-{wrapper}"] for one in found),
    )
    assert_same_run(first, alone)
    assert equal(first["weights"], second["weights"])
    assert first["told"] == second["told"] == []


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_frozen_weights_are_left_out_and_known_by_the_same_hashes(wrapper, folder, found, tmp_path):
    alone = run([Naive()], TEXT, "none", tmp_path / "alone", backbone=Given)
    assert_same_run(found[0][f"given-{wrapper}"], alone)
    one, two = (
        torch.load(max(path.glob("checkpoints/*.pt")), weights_only=True)["state"]
        for path in (tmp_path / "alone", folder / f"given-{wrapper}")
    )
    assert one["frozen"].keys() == {
        "first.weight",
        *(f"blocks.{k}.base.{name}" for k in (0, 1) for name in ("weight", "bias")),
    }
    assert two["frozen"] == one["frozen"]
    assert two["model"].keys() == one["model"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_new_optimizer_trains_every_weight(wrapper, found):
    """It is made behind a measurement, which leaves shards where they are."""
    assert_same_run(found[0][f"reset-{wrapper}"], run([Naive()], IMAGES, reset_optimizer=True))


@pytest.mark.slow
def test_processes_with_other_heads_in_their_rows(found):
    assert_same_run(found[0]["heads"], run([Replay(capacity=40)], Setting.TASK_INCREMENTAL))
    assert equal(found[0]["heads"]["weights"], found[1]["heads"]["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agem", "gem"])
def test_what_dropout_draws_in_one_process_all_project_by(name, found):
    first, second = (one[f"dropped-{name}"] for one in found)
    assert equal(first["weights"], second["weights"])


@pytest.mark.slow
def test_gradients_are_exchanged_once_a_step(found):
    assert found[0][f"naive-{IMAGES}-ddp"]["exchanges"] == len(found[0][f"naive-{IMAGES}-ddp"]["losses"]) == 18


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_what_overflows_in_one_process_is_skipped_by_all(wrapper, found):
    alone, (first, second) = run([Overflow()], IMAGES, precision="fp16"), (one[f"overflow-{wrapper}"] for one in found)
    assert first["traces"] == second["traces"] == alone["traces"] == [["loss_scale", 7, 2.0**20]]
    assert_same_run(first, alone, tolerance=1e-3)
    assert equal(first["weights"], second["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_weights_that_are_not_finite_are_not_saved(wrapper, folder, found, tmp_path):
    """And every process names the checkpoint that is left."""
    alone = run([Break()], IMAGES, "none", tmp_path)["error"].replace(str(tmp_path), str(folder / f"broken-{wrapper}"))
    assert alone.endswith("step-000000000.pt")
    assert alone.startswith("the update left weights that are not finite at step 5") and "head.bias = nan" in alone
    assert [one[f"broken-{wrapper}"]["error"] for one in found] == [alone, alone]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Der, Derpp])
def test_stored_logits_are_those_of_all_rows(kind, found):
    """Every process holds the whole buffer: the same rows as one process has, and their logits up to rounding."""
    first, second = (one[f"{kind.__module__.split('.')[1]}-{IMAGES}-ddp"]["strategies"][0] for one in found)
    assert equal(first, second)
    alone = run(made(kind), IMAGES)["strategies"][0]
    assert torch.equal(first["columns"]["sample_ids"], alone["columns"]["sample_ids"])
    assert torch.allclose(first["columns"]["logits"], alone["columns"]["logits"], atol=1e-4)


@pytest.mark.slow
def test_stored_logits_go_on_in_one_process(folder, found, tmp_path):
    stopped = found[0]["stopped-derpp"]
    shutil.copytree(folder / "two-derpp", tmp_path / "two")
    rest = run([Derpp(capacity=40)], IMAGES, "none", tmp_path / "two", resume=True)
    assert_same_run(rest | {"losses": stopped["losses"] + rest["losses"]}, run([Derpp(capacity=40)], IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_run_of_two_goes_on_in_one(wrapper, folder, found, tmp_path):
    stopped = found[0][f"stopped-{wrapper}"]
    assert stopped["status"] == "interrupted" and len(stopped["losses"]) == STOP
    assert [one[f"stopped-{wrapper}"]["wrote"] for one in found] == [True, False]
    shutil.copytree(folder / f"two-{wrapper}", tmp_path / "two")
    rest = run([Replay(capacity=40)], TEXT, "none", tmp_path / "two", resume=True)
    whole = run([Replay(capacity=40)], TEXT)
    assert_same_run(rest | {"losses": stopped["losses"] + rest["losses"]}, whole)
    assert equal(rest["strategies"], whole["strategies"])


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_run_of_one_goes_on_in_two(wrapper, found):
    rest, whole = found[0][f"resumed-{wrapper}"], run([Replay(capacity=40)], TEXT)
    assert rest["status"] == "done" and len(rest["losses"]) == 18 - STOP
    assert_same_run(rest, whole | {"losses": whole["losses"][STOP:]})
    assert rest["counted"] == whole["counted"]


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_every_process_goes_on_drawing_dropout_from_where_it_stood(wrapper, found):
    whole, stopped, rest = (found[0][f"drops{name}-{wrapper}"] for name in ("", "-stopped", "-resumed"))
    assert len(stopped["losses"]) == STOP and stopped["losses"] + rest["losses"] == whole["losses"]
    for name in ("R", "weights", "optimizer", "strategies"):
        assert equal(rest[name], whole[name]), name


# what processes say to each other, and one batch, by hand


@pytest.mark.slow
def test_what_processes_say_to_each_other(found):
    """Sums of 6 and 12 over 0 and 1 things are 18 / 1 in the mean, 12 and 24 in each; so are their slopes, 12 each."""
    for rank, said in enumerate(one["verbs"] for one in found):
        assert equal(said["every"], [{"rank": k, "rows": torch.arange(k)} for k in range(2)])
        assert said["anywhere"] == [False, True, True]
        assert {name: term.item() for name, term in said["mean"].items()} == {"a": 1.5, "b": 1.5}
        assert said["pooled"] == (12.0 * (1 + rank), torch.tensor([12.0])) and said["nothing"] == 0.0
        assert said["firsts"].tolist() == [1.0]
        assert {rows: joined.tolist() for rows, joined in said["joined"].items()} == {1: [0], 2: [0, 1], 5: [*range(5)]}


@pytest.mark.parametrize("is_old", [False, True])
def test_the_generator_of_the_runs_own_gpu_goes_on(is_old, monkeypatch):
    """Once those of all GPUs were written down, by the first process."""
    state = Trainer(stream_of(IMAGES), Blocks, [Naive()], optimizer=partial(torch.optim.SGD, lr=0.1)).state
    saved, of_gpus, found = state.state_dict(), torch.arange(3)[:, None], []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: of_gpus[device.index])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: found.append((value.item(), device.index)))
    card = torch.device("cuda", 1)
    saved["generators"] = [global_states(card)]
    if is_old:
        saved |= {"torch_rng": saved.pop("generators")[0]["cpu"], "cuda_rng": list(of_gpus)}
    state.device = card
    with torch.random.fork_rng(devices=[]):
        state.load_state_dict(saved)
    assert found == [(1, 1)]


@pytest.mark.parametrize(("rank", "drawn"), [(0, 1), (1, 2), (2, None)])
@pytest.mark.parametrize("is_old", [False, True])
def test_generators_of_another_number_of_processes(rank, drawn, is_old):
    """Who was there goes on, who was not draws what its rank and the step say; once only the first was written down."""
    trainer = Trainer(stream_of(IMAGES), Blocks, [Naive()], optimizer=partial(torch.optim.SGD, lr=0.1))
    state, draws = trainer.state, [torch.Generator().manual_seed(k) for k in range(3)]
    saved = state.state_dict() | {"counters": [7, 0, 0, 0], "generators": [{"cpu": g.get_state()} for g in draws[1:]]}
    if is_old:
        del saved["generators"]
        saved |= {"torch_rng": draws[1].get_state(), "cuda_rng": []}
    state.world = World("ddp", rank, 3)
    with torch.random.fork_rng():
        state.load_state_dict(saved)
        found = torch.rand(3)
    wanted = torch.Generator().manual_seed(derive_seed(0, "torch", rank, 7))
    if drawn and not (is_old and rank):
        wanted = draws[drawn]
    assert torch.equal(found, torch.rand(3, generator=wanted))


def rows(count, tokens=4):
    return Batch(torch.arange(count * tokens).view(count, tokens), torch.zeros(count, tokens, dtype=torch.long),
                 torch.zeros(count), torch.arange(count))  # fmt: skip


@pytest.mark.parametrize(("current", "replayed"), [(5, 3), (1, 2), (4, 0), (2, 1)])
def test_the_mean_over_shares_is_the_loss_of_the_batch(current, replayed):
    batch = rows(current)
    batch.targets[0, 1:] = IGNORED
    if replayed:
        batch = batch.extended(rows(replayed), Source.REPLAY, "replay", weight=0.5)
    logits = torch.randn(len(batch), 4, 3, generator=torch.Generator().manual_seed(0))
    whole = cross_entropy(Output(logits), batch)
    losses, seen = [], []
    for rank in range(3):
        own = World("ddp", rank, 3).split(batch)
        index = torch.tensor(
            [
                next(
                    k
                    for k in range(len(batch))
                    if torch.equal(batch.inputs[k], x) and (k >= current) == (n >= own.num_current)
                )
                for n, x in enumerate(own.inputs)
            ]
        )
        losses.append(cross_entropy(Output(logits[index]), own))
        seen += [(k, part.owner) for part in own.parts if part.weight for k in index[part.rows].tolist()]
    assert float(torch.stack(losses).mean()) == pytest.approx(float(whole), abs=1e-6)
    assert len(set(seen)) == len(seen) <= len(batch)


@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_what_is_shown_is_what_split_keeps(num_rows):
    """Processes without a row of their own are shown one of another's; the rest is cut without gaps."""
    batch, seen = rows(num_rows), []
    for rank in range(3):
        world = World("ddp", rank, 3)
        own = world.split(batch)
        assert torch.equal(own.inputs, batch.inputs[world.shown(num_rows)])
        seen += own.sample_ids.tolist() if own.parts[0].share else []
    assert seen == list(range(num_rows))


def test_a_single_process_passes_everything_on():
    batch, world = rows(3), World()
    assert world.split(batch) is batch
    terms = {"cross_entropy": torch.ones(())}
    assert world.mean(terms) is terms
    assert torch.equal(world.joined(batch.inputs, 3), batch.inputs)
    assert world.any(True) and not world.any(False)


def test_heads_of_single_tasks_are_not_sharded():
    """A process whose rows all have one task would wait for ever for the others'."""
    check_world(World("ddp", 0, 2), [Naive()], torch.nn.Linear(2, 2), masks_absent=False, num_heads=2)
    with pytest.raises(UserError, match="each task has a head of its own; take ddp"):
        check_world(World("fsdp", 0, 2), [Naive()], torch.nn.Linear(2, 2), masks_absent=False, num_heads=2)


class Commits(torch.nn.Linear):
    """A memory that keeps what it reads."""

    commits = True


@pytest.mark.parametrize(
    ("strategies", "model", "options", "sentence"),
    [
        ([Lwf()], torch.nn.Linear(2, 2), {"num_heads": 2}, "lwf has a penalty, which trainer.parallel=ddp allows with"),
        ([Naive()], torch.nn.Sequential(Commits(2, 2)), {}, "memory outlives a batch and would differ"),
        (
            [Gdumb()],
            torch.nn.Linear(2, 2),
            {},
            "gdumb does not run under trainer.parallel=ddp; of the wrappers it declares none",
        ),
        ([Naive()], torch.nn.BatchNorm1d(2), {}, "normalises over the batch"),
        ([Naive()], torch.nn.Linear(2, 2), {"masks_absent": True}, "trainer.logit_mask is 'batch'"),
    ],
)
def test_what_needs_the_whole_batch_is_refused(strategies, model, options, sentence):
    options = {"masks_absent": False, "num_heads": 1} | options
    check_world(World(), strategies, model, **options)
    check_world(World("fsdp", 0, 2), [Naive()], torch.nn.Linear(2, 2), masks_absent=False, num_heads=1)
    check_world(World("ddp", 0, 2), [Lwf()], torch.nn.Linear(2, 2), masks_absent=False, num_heads=1)
    with pytest.raises(UserError, match=sentence):
        check_world(World("ddp", 0, 2), strategies, model, **options)
