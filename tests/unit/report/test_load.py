import json
import os

import pytest

from cl.report.load import load_folder, load_results, sections


def save(results, root):
    for k, result in enumerate(results):
        result.save(root / f"run-{k}" / "result.json")


def test_every_result_below_a_folder_is_found(tmp_path, runs):
    save(runs, tmp_path / "a" / "b")
    assert sorted(r.label for r in load_results(tmp_path)) == sorted(r.label for r in runs)


def test_a_run_folder_is_a_folder_too(tmp_path, make_result):
    make_result().save(tmp_path / "result.json")
    assert [r.label for r in load_results(tmp_path)] == ["naive"]


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"there is no result\.json under"):
        load_results(tmp_path)


BROKEN = {
    "cut": lambda content: json.dumps(content)[:-30],
    "other schema": lambda content: json.dumps(content | {"schema": 99}),
    "no object": lambda content: "[1, 2]",
    "missing key": lambda content: json.dumps({k: v for k, v in content.items() if k != "seed"}),
    "ragged": lambda content: json.dumps(content | {"R": [[0.9, 0.1], [0.5]]}),
    "impossible": lambda content: json.dumps(content | {"R": [[0.9, 0.1], [0.5, 7.0]]}),
    "text in R": lambda content: json.dumps(content | {"R": [["a", "b"]]}),
    "strategy is text": lambda content: json.dumps(content | {"strategy": "naive"}),
    "status": lambda content: json.dumps(content | {"status": "splendid"}),
    "measure": lambda content: json.dumps(content | {"measure": "luck"}),
    "seed": lambda content: json.dumps(content | {"seed": "one"}),
    "done without rows": lambda content: json.dumps(content | {"R": []}),
    "cost": lambda content: json.dumps(content | {"cost": [1]}),
    "cost value": lambda content: json.dumps(content | {"cost": {"forwards": "many"}}),
    "versions": lambda content: json.dumps(content | {"env": {"versions": [1]}}),
    "course": lambda content: json.dumps(content | {"course": [[0, 1]]}),
    "words in the course": lambda content: json.dumps(content | {"course": [["a", "b", "c", "d"]]}),
    "run id": lambda content: json.dumps(content | {"mlflow_run_id": 7}),
    "bytes": lambda content: "\udcff",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_alone_is_an_error_that_names_it_and_among_good_ones_a_warning(tmp_path, make_result, kind):
    make_result().save(tmp_path / "bad" / "result.json")
    path = tmp_path / "bad" / "result.json"
    path.write_text(BROKEN[kind](json.loads(path.read_text())), errors="surrogateescape")
    with pytest.raises(ValueError, match=r"bad.result\.json") as caught:
        load_folder(tmp_path)
    assert "\n" not in str(caught.value)
    make_result("replay").save(tmp_path / "good" / "result.json")
    loaded = load_folder(tmp_path)
    assert [r.label for r in loaded.results] == ["replay"]
    assert len(loaded.warnings) == 1
    assert str(path) in loaded.warnings[0]


def test_sections_keep_apart_what_cannot_be_compared(make_result):
    results = [
        make_result("naive"),
        make_result("replay"),
        make_result("naive", backbone="convnet"),
        make_result("naive", setting="class_incremental"),
        make_result("naive", R=[[0.9] * 3] * 3),
        make_result("naive", stream="other"),
    ]
    found = sections(results)
    assert [len(section.results) for section in found] == [2, 1, 1, 1, 1]
    titles = [section.title for section in found]
    assert len(set(titles)) == 5
    assert "toy · convnet" in titles
    assert sections([make_result()])[0].title == "toy · mlp"


def test_of_two_finished_runs_of_a_seed_the_newer_counts_and_a_warning_says_so(make_result):
    old, new = make_result("replay", 3), make_result("replay", 3, R=[[1.0, 0.0], [1.0, 1.0]])
    (section,) = sections([old, new])
    assert section.finished("replay") == [new]
    assert section.warnings == ["replay, seed 3 on toy · mlp: 2 finished runs; the newest is used"]


def test_a_finished_run_replaces_its_failed_predecessor(make_result):
    failed = make_result("replay", 0, R=[[0.5, 0.1]], status="failed", error="x")
    lost = make_result("replay", 1, R=[[0.5, 0.1]], status="interrupted")
    (section,) = sections([failed, make_result("replay", 0), lost])
    assert [r.seed for r in section.finished("replay")] == [0]
    assert section.unfinished() == [lost]


def test_a_branch_is_left_out_beside_other_runs_and_shown_alone(tmp_path, make_result):
    save([make_result("naive", 0), make_result("replay", 0), make_result("naive", 0)], tmp_path)
    (tmp_path / "run-2" / "config.yaml").write_text("trainer: {max_steps: 30}\norigin:\n  verb: extend\n")
    loaded = load_folder(tmp_path)
    assert [r.label for r in loaded.results] == ["naive", "replay"]
    (said,) = loaded.warnings
    assert said.startswith(f"{tmp_path / 'run-2'} goes on from another run and is left out")
    alone = load_folder(tmp_path / "run-2")
    assert [r.label for r in alone.results] == ["naive"] and not alone.warnings


def test_a_copy_of_the_folder_has_the_same_order_whatever_its_times(tmp_path, make_result):
    save([make_result("ewc", 1), make_result("ewc", 0), make_result(stream="later"), make_result()], tmp_path)
    orders = []
    for times in ((1, 2, 3, 4), (4, 3, 2, 1)):
        for k, time in enumerate(times):
            os.utime(tmp_path / f"run-{k}" / "result.json", (time, time))
        orders.append([(r.stream, r.label, r.seed) for r in load_results(tmp_path)])
    assert orders[0] == orders[1] == [("later", "naive", 0), ("toy", "ewc", 0), ("toy", "ewc", 1), ("toy", "naive", 0)]


def test_of_two_files_of_a_seed_the_newer_is_last(tmp_path, make_result):
    save([make_result(R=[[1.0, 0.0], [1.0, 1.0]]), make_result()], tmp_path)
    os.utime(tmp_path / "run-1" / "result.json", (1, 1))
    assert [r.R[0][0] for r in load_results(tmp_path)] == [0.9, 1.0]


def test_what_mlflow_keeps_of_a_run_is_no_second_run(tmp_path, make_result):
    run_id = "0123456789abcdef" * 2
    copy = tmp_path / "mlartifacts" / run_id / "artifacts"
    for folder in (tmp_path / "runs" / "one", copy):
        make_result(mlflow_run_id=run_id).save(folder / "result.json")
    loaded = load_folder(tmp_path)
    assert len(loaded.results) == 1 and not loaded.warnings
    assert len(load_results(copy.parents[1])) == 1, "where nothing else is left"


def config(path, **parts):
    path.write_text(json.dumps(parts))


def test_runs_that_differ_in_a_setting_are_not_taken_for_seeds(tmp_path, make_result):
    for k, (alpha, lr) in enumerate([(0.1, 0.01), (0.2, 0.01), (0.2, 0.05)]):
        make_result("derpp+refresh", seed=0).save(tmp_path / f"{k}" / "result.json")
        strategy = {"derpp": {"_target_": "strategies.derpp.Derpp", "alpha": alpha}, "refresh": {"period": 4}}
        config(tmp_path / f"{k}" / "config.yaml", strategy=strategy, optimizer={"lr": lr}, seed=k)
    assert sorted(r.label for r in load_results(tmp_path)) == [
        "derpp(alpha=0.1)+refresh(optimizer.lr=0.01)",
        "derpp(alpha=0.2)+refresh(optimizer.lr=0.01)",
        "derpp(alpha=0.2)+refresh(optimizer.lr=0.05)",
    ]


def test_seeds_folders_and_watching_are_no_settings(tmp_path, make_result):
    for seed in range(3):
        make_result("replay", seed).save(tmp_path / f"{seed}" / "result.json")
        config(
            tmp_path / f"{seed}" / "config.yaml",
            seed=seed,
            strategy={"replay": {"capacity": 200}},
            stream={"permutation_seed": seed, "base": {"root": f"/data-{seed}"}, "cache": f"/cache-{seed}"},
            trainer={"device": f"cuda:{seed}", "checkpoint_every": seed, "parallel": ("none", "ddp", "fsdp")[seed]},
            tracking={"uri": f"file:{seed}"},
        )
    assert {r.label for r in load_results(tmp_path)} == {"replay"}


def test_a_config_that_cannot_be_read_changes_nothing(tmp_path, make_result):
    for seed, text in enumerate(["{broken", "- a list", "strategy: {naive: {x: 1}}"]):
        make_result("naive", seed).save(tmp_path / f"{seed}" / "result.json")
        (tmp_path / f"{seed}" / "config.yaml").write_text(text)
    assert {r.label for r in load_results(tmp_path)} == {"naive"}
