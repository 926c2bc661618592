import pytest

from cl.report.curves import view
from cl.report.load import sections
from cl.report.words import environment, facts, glossaries, glossary, headline, ranges, unfinished


def view_of(results):
    (section,) = sections(results)
    return view(section)


def test_headline_names_the_best_that_is_no_bound(runs):
    assert headline(view_of(runs)) == (
        "replay ends best with 80.0 % final accuracy (95 % interval 80.0 to 80.0), 15.0 points above naive; "
        "that is 55 % of the way from naive to joint."
    )


def test_headline_of_losses(make_result):
    results = [
        make_result("naive", 0, [[2.0, 4.0], [3.0, 2.0]], measure="loss"),
        make_result("replay", 0, [[2.0, 4.0], [2.5, 2.0]], measure="loss"),
    ]
    assert headline(view_of(results)) == "replay ends best with 2.250 nats final loss, 0.250 nats below naive."


@pytest.mark.parametrize(
    ("ewc", "sentence"),
    [
        ((0.7, 0.8), "It is ahead of ewc (by 5.0 points, interval +5.0 to +5.0)."),
        ((0.9, 0.6), "It is not clearly ahead of ewc (by 5.0 points, interval −5.0 to +15.0)."),
    ],
)
def test_headline_weighs_the_runner_up(make_result, ewc, sentence):
    results = []
    for seed in (0, 1):
        results.append(make_result("naive", seed))
        results.append(make_result("replay", seed, [[0.9, 0.1], [0.8, (0.8, 0.9)[seed]]]))
        results.append(make_result("ewc", seed, [[0.9, 0.1], [0.8, ewc[seed]]]))
    assert headline(view_of(results)).endswith(sentence)


def test_an_interval_has_the_sign_of_its_margin(make_result):
    losses = {"naive": (3.0, 3.0), "replay": (2.5, 2.4), "ewc": (2.7, 2.8)}
    results = [
        make_result(name, seed, [[2.0, 4.0], [final, 2.0]], measure="loss")
        for name, finals in losses.items()
        for seed, final in enumerate(finals)
    ]
    assert headline(view_of(results)).endswith("It is ahead of ewc (by 0.150 nats, interval +0.100 to +0.200).")


def test_one_strategy_beside_joint_does_not_end_best(make_result):
    joint = make_result("joint", 0, [[0.9, 0.9]], experiences=["all"], trained=[-1])
    assert headline(view_of([make_result("naive"), joint])) == "naive reaches 70.0 % final accuracy."


def test_a_runner_up_that_is_ahead_on_the_shared_seeds(make_result):
    # over its own three seeds ewc is worse than replay, over the two that both have it is better
    finals = {"replay": (0.7, 0.7), "ewc": (0.8, 0.8, 0.2)}
    results = [
        make_result(name, seed, [[0.9, 0.1], [0.8, final]])
        for name, values in finals.items()
        for seed, final in enumerate(values)
    ]
    sentence = "On the seeds of both, ewc is ahead (by 5.0 points, interval +5.0 to +5.0)."
    assert headline(view_of(results)).endswith(sentence)
    losses = {"replay": (2.5, 2.5), "ewc": (2.0, 2.0, 5.0)}
    results = [
        make_result(name, seed, [[2.0, 4.0], [2.0, final]], measure="loss")
        for name, values in losses.items()
        for seed, final in enumerate(values)
    ]
    sentence = "On the seeds of both, ewc is ahead (by 0.250 nats, interval +0.250 to +0.250)."
    assert headline(view_of(results)).endswith(sentence)


def test_headline_of_one_run_and_of_none(make_result):
    assert headline(view_of([make_result("derpp")])) == "derpp reaches 70.0 % final accuracy."
    assert headline(view_of([make_result("derpp", R=[[0.9, 0.1]], status="interrupted")])) == ""


def test_facts(runs):
    (section,) = sections(runs)
    found = dict(facts(section))
    assert found["Stream"] == "toy (2 experiences)"
    assert found["Setting"] == "domain incremental"
    assert found["Seeds"] == "0, 1"
    assert found["Runs"] == "6 finished, 1 unfinished"
    assert found["Environment"] == "Python 3.11.7, device cpu, torch 2.9"


def test_environments_that_differ_are_all_named(make_result):
    results = [make_result(env={"device": device}) for device in ("cuda", "cpu")]
    assert environment(results) == "device cpu / cuda"
    assert environment([make_result(env={})]) == "unknown"


def test_reasons(runs, make_result):
    (section,) = sections([*runs, make_result("agem", 4, [[0.9, 0.1]], status="interrupted")])
    assert dict(unfinished(section)) == {
        "agem, seed 4": "interrupted or still running, after 1 of 2 experiences",
        "ewc, seed 0": "failed after 1 of 2 experiences: the loss is not finite at step 7",
    }


def test_every_column_is_explained(runs):
    names = dict(glossary(view_of(runs)))
    assert {"Final accuracy", "Forgetting (max)", "BWT", "Difference to naive", "Test", "Work", "Kept"} <= set(names)


def test_what_is_not_shown_is_not_explained(make_result):
    names = dict(glossary(view_of([make_result()])))
    assert not {"Interval", "Front", "Difference to naive"} & set(names)
    assert "×" not in names["Work"]


def test_a_page_of_several_sections_explains_everything_once(make_result):
    runs = [make_result(stream=stream) for stream in ("toy", "other")]
    runs.append(make_result(stream="text", measure="loss", R=[[2.0, 4.0], [3.0, 2.0]], R_init=[4.0, 4.5]))
    entries = glossaries([view(section) for section in sections(runs)])
    names = [name for name, _ in entries]
    assert len(set(names)) == len(names)
    assert {"BWT (accuracy)", "BWT (loss)", "Final accuracy", "Final loss", "Work"} <= set(names)
    assert dict(entries)["BWT (loss)"].endswith("positive means forgetting")


def test_ranges():
    assert ranges([0, 1, 2, 3, 4]) == "0–4"
    assert ranges([1]) == "1"
    assert ranges([]) == ""
