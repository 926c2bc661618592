import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from cl.report import payload, write_report
from cl.report.curves import view
from cl.report.html import page
from cl.report.load import sections
from cl.report.markdown import markdown
from cl.report.style import looks

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}
NASTY = "<script>alert('x')</script>&\"|`$x"


class Page(HTMLParser):
    """Collects tags, attributes, text and data; notes what is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.faults, self.tags, self.references, self.ids, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.references += [
            value for name, value in attrs.items() if name in ("src", "href", "action", "data", "srcset")
        ]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        self.text.append(((self.open or [""])[-1], data))

    def data(self):
        return json.loads(next(text for tag, text in self.text if tag == "script"))

    def visible(self):
        return " ".join(text for tag, text in self.text if tag not in ("script", "style"))


def views_of(results):
    palette = looks(result.label for result in results)
    return [view(section, palette=palette) for section in sections(results)]


def read(results, title="A title", date="2026-01-05", warnings=()):
    """The page alone: figures take seconds, and most tests need none."""
    return Page(page(views_of(results), title, date, warnings))


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr("cl.report.figures.save_figures", lambda view, folder: [])


def test_everything_is_written(tmp_path, runs):
    paths = write_report(runs, tmp_path, title="T", date="today")
    assert paths.html == tmp_path / "report.html"
    assert paths.markdown == tmp_path / "report.md"
    assert {path.parent for path in paths.figures} == {tmp_path / "figures"}
    names = ["accuracy_matrix.json", "seen_average.json", "comparison.json", "seeds.json"]
    assert [path.name for path in paths.tables] == names
    assert all(path.stat().st_size > 0 for path in (*paths.figures, *paths.tables))
    assert Page(paths.html.read_text()).faults == []
    text = paths.markdown.read_text()
    assert text.startswith("# T\n\ntoday\n")
    assert "![comparison](figures/comparison.png)" in text


def test_sections_share_one_glossary(runs, make_result):
    found = read([*runs, make_result("naive", backbone="convnet")])
    assert found.faults == [] and found.visible().count("What the numbers mean") == 1
    text = markdown(views_of([*runs, make_result("naive", backbone="convnet")]), "T")
    assert text.count("**Final accuracy**") == 1 and text.index("convnet") < text.index("**Final accuracy**")


def test_a_second_report_takes_away_what_only_the_first_one_had(tmp_path, runs, make_result):
    other = make_result("naive", backbone="convnet")
    stray = tmp_path / "figures" / "mine.png"
    write_report([*runs, other], tmp_path)
    sections = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert sections == ["1_toy_mlp", "2_toy_convnet"] or sections == ["1_toy_convnet", "2_toy_mlp"]
    write_report(runs, tmp_path)
    assert not any(path.is_dir() for path in [*(tmp_path / "figures").iterdir(), *(tmp_path / "tables").iterdir()])
    assert (tmp_path / "figures" / "accuracy_matrix_replay.png").exists()
    stray.write_bytes((tmp_path / "figures" / "comparison.png").read_bytes())
    changed = tmp_path / "figures" / "accuracy_matrix_joint.png"
    changed.write_bytes(b"somebody's own")
    (tmp_path / ".report.json").write_text((tmp_path / ".report.json").read_text().replace("{", '{"../x.png": "0",'))
    left = write_report([run for run in runs if run.label in ("naive", "ewc")], tmp_path)
    on_disk = {path for path in tmp_path.rglob("*.*") if path.parent.name in ("figures", "tables")}
    assert on_disk == {*left.figures, *left.tables, stray, changed}


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_list_of_its_files_takes_nothing_away(tmp_path, make_result, no_figures, text):
    write_report([make_result()], tmp_path)
    (tmp_path / "tables" / "seeds.json").rename(tmp_path / "tables" / "old.json")
    (tmp_path / ".report.json").write_text(text)
    write_report([make_result()], tmp_path)
    assert (tmp_path / "tables" / "old.json").exists() and (tmp_path / "tables" / "seeds.json").exists()


def test_the_page_is_sound_and_loads_nothing(runs):
    text = page(views_of(runs), "A title")
    found = Page(text)
    assert found.faults == []
    assert ("html", {"lang": "en"}) in found.tags
    assert len(found.ids) == len(set(found.ids))
    assert all(re.match(r"#|data:", reference) for reference in found.references)
    # the one url() refers to a clip path of the page itself
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", text.replace("url(#${id})", ""))
    assert "default-src 'none'" in text
    assert all("scope" in attrs for tag, attrs in found.tags if tag == "th")
    assert len(text) < 500_000


def test_the_page_says_what_was_measured(runs):
    text = read(runs, title="My comparison").visible()
    for expected in (
        "My comparison",
        "2026-01-05",
        "6 finished, 1 unfinished",
        "failed after 1 of 2 experiences: the loss is not finite at step 7",
        "60.0 to 70.0",
        "+15.0",
        "too few seeds to test: 2, needs 7",
        "2 KiB",
        "best earlier value minus last",
    ):
        assert expected in text


def test_the_charts_have_the_numbers_of_the_table(runs):
    (section,) = read(runs).data()["sections"]
    by_label = {strategy["label"]: strategy for strategy in section["strategies"]}
    assert by_label["naive"]["final"]["mean"] == pytest.approx(0.65)
    assert by_label["naive"]["final"]["seeds"] == [[0, 0.7], [1, 0.6]]
    assert by_label["naive"]["matrices"][0]["R"] == [[8500, 1000], [5000, 8000]]
    assert by_label["naive"]["matrices"][0]["taught"] == [0, 1]
    assert by_label["joint"]["bound"]
    assert not by_label["ewc"]["finished"]
    assert by_label["ewc"]["final"] is None


def test_taught_is_when_a_domain_counts_as_seen_for_good(make_result):
    R = [[0.4, 0.6], [0.9, 0.2], [0.6, 0.8]]
    late = make_result("naive", R=R, experiences=["all", "a", "b"], trained=[-1, 0, 1])
    never = make_result("replay", R=R, experiences=["a", "b", "c"], trained=[0, 0, 0])
    (section,) = read([late, never]).data()["sections"]
    taught = {strategy["label"]: strategy["matrices"][0]["taught"] for strategy in section["strategies"]}
    assert taught == {"naive": [0, 2], "replay": [0, -1]}


def test_rows_can_be_sorted_by_number(runs):
    tags = read(runs).tags
    values = [float(attrs["data-value"]) for tag, attrs in tags if tag == "td" and "data-value" in attrs]
    assert 0.65 in values
    assert sum("aria-sort" in attrs for tag, attrs in tags if tag == "th") == 1


def test_names_never_become_markup(make_result):
    results = [make_result("naive"), make_result(NASTY), make_result(NASTY, 1, status="failed", error=NASTY)]
    for result in results:
        result.domains = result.experiences = [f"{NASTY} {j}" for j in range(2)]
        result.stream = result.backbone = NASTY
    found = read(results, NASTY, NASTY, [NASTY])
    assert found.faults == []
    assert sum(tag == "script" for tag, _ in found.tags) == 2
    assert "alert(" in found.visible()
    assert found.data()["sections"][0]["domains"] == [f"{NASTY} {j}" for j in range(2)]
    text = markdown(views_of(results), NASTY, NASTY, [NASTY])
    assert not re.search(r"(?<!\\)<script", text)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1


@pytest.mark.usefixtures("no_figures")
def test_a_report_made_twice_is_the_same(tmp_path, runs):
    first, second = (write_report(runs, tmp_path / name) for name in ("a", "b"))
    ours = (first.html, first.markdown, *first.tables)
    for one, other in zip(ours, (second.html, second.markdown, *second.tables), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_single_run_is_reported(make_result):
    text = read([make_result("derpp", 3)]).visible()
    assert "derpp reaches 70.0 % final accuracy." in text
    assert "Difference" not in text


def test_a_single_experience_is_reported(make_result):
    found = read([make_result("naive", 0, [[0.9]]), make_result("replay", 0, [[0.95]])])
    assert [attrs["data-chart"] for _, attrs in found.tags if "data-chart" in attrs] == ["dots", "cost", "heatmap"]


@pytest.mark.usefixtures("no_figures")
def test_only_unfinished_runs_are_reported_too(tmp_path, make_result):
    lost = make_result("ewc", 0, [], status="failed", error="no data")
    found = read([lost, make_result("agem", 0, [[0.9, 0.1]], status="interrupted")])
    assert "after 1 of 2 experiences" in found.visible()
    assert [s["label"] for s in found.data()["sections"][0]["strategies"]] == ["agem"]
    paths = write_report([lost], tmp_path)
    assert "no data" in Page(paths.html.read_text()).visible()
    assert "no data" in paths.markdown.read_text()


def test_losses(make_result):
    results = [
        make_result(label, seed, [[2.0, 4.0], [last, 2.0 + 0.1 * seed]], measure="loss", R_init=[4.0, 4.5])
        for label, last in (("naive", 3.0), ("replay", 2.5))
        for seed in (0, 1)
    ]
    found = read(results)
    assert "Loss in nats, lower is better" in found.visible()
    (section,) = found.data()["sections"]
    assert section["strategies"][0]["label"] == "replay"
    assert section["strategies"][0]["matrices"][0]["init"] == [40000, 45000]
    assert not section["unit"]["up"]


def test_streams_get_sections_and_folders_of_their_own(tmp_path, make_result, monkeypatch):
    folders = []
    monkeypatch.setattr("cl.report.figures.save_figures", lambda view, folder: folders.append(folder) or [])
    results = [
        make_result(name, stream=stream) for stream in ("toy", "other/../stream") for name in ("naive", "replay")
    ]
    results = [make_result("ewc"), *results]
    paths = write_report(results, tmp_path)
    assert {folder.parent for folder in folders} == {tmp_path / "figures"}
    assert len(set(folders)) == 2
    assert {path.parent.parent for path in paths.tables} == {tmp_path / "tables"}
    found = Page(paths.html.read_text()).data()["sections"]
    colours = [{s["label"]: s["colour"] for s in section["strategies"]} for section in found]
    assert colours[0]["replay"] == colours[1]["replay"]


@pytest.mark.usefixtures("no_figures")
def test_warnings_are_shown_and_returned(tmp_path, make_result):
    for name in ("a", "b"):
        make_result().save(tmp_path / "runs" / name / "result.json")
    (tmp_path / "runs" / "c").mkdir()
    (tmp_path / "runs" / "c" / "result.json").write_text("{")
    paths = write_report(tmp_path / "runs", tmp_path / "out")
    assert len(paths.warnings) == 2
    for text in (Page(paths.html.read_text()).visible(), paths.markdown.read_text()):
        assert "2 finished runs; the newest is used" in text
        assert "is not a result file" in text


def test_nothing_to_report():
    with pytest.raises(ValueError, match="there is no result"):
        write_report([], "nowhere")


def test_long_streams_stay_small(make_result):
    values = np.random.default_rng(0).uniform(size=(2, 4, 200, 200)).tolist()
    results = [
        make_result(label, seed, values[k][seed]) for k, label in enumerate(("naive", "replay")) for seed in range(4)
    ]
    text = page(views_of(results), "Long")
    assert len(text) < 6_000_000
    found = Page(text)
    (section,) = found.data()["sections"]
    assert [len(strategy["matrices"]) for strategy in section["strategies"]] == [1, 1]
    assert section["step"] == 1
    assert "the page shows a part of R" in found.visible()


def test_longer_streams_are_thinned(make_result, monkeypatch):
    monkeypatch.setattr(payload, "MAX_CELLS", 50)
    made = views_of([make_result("naive", 0, np.full((20, 20), 0.5).tolist())])
    (section,) = json.loads(payload.payload(made))["sections"]
    assert section["step"] == 3
    R = section["strategies"][0]["matrices"][0]["R"]
    assert (len(R), len(R[0])) == (7, 7)


@pytest.mark.usefixtures("no_figures")
def test_tables_are_long_and_have_no_nulls(tmp_path, runs, make_result):
    paths = write_report([*runs, make_result("lwf", 0, [[0.9, None], [None, 0.8]])], tmp_path)
    tables = {path.stem: json.loads(path.read_text()) for path in paths.tables}
    for table in tables.values():
        assert all(len(row) == len(table["columns"]) and None not in row for row in table["data"])
    matrix = tables["accuracy_matrix"]
    assert matrix["columns"] == ["strategy", "seed", "after", "experience", "domain", "value"]
    assert ["naive", 0, 2, "domain 1", "domain 0", 0.6] in matrix["data"]
    assert ["naive", 0, 0, "", "domain 0", 0.1] in matrix["data"]
    assert sum(row[0] == "lwf" and row[2] > 0 for row in matrix["data"]) == 2
    values = {tuple(row[:3]): row[3] for row in tables["comparison"]["data"]}
    assert values["replay", "final_minus_naive", "mean"] == pytest.approx(0.15)
    assert values["naive", "passes", "mean"] == 1500
    assert ["naive", "final", 1, pytest.approx(0.6)] in tables["seeds"]["data"]


def test_markdown(runs):
    text = markdown(views_of(runs), "T")
    assert "| naive | 2 | 65.0 \\[60.0, 70.0\\] |" in text
    assert "- ewc, seed 0: failed after 1 of 2 experiences: the loss is not finite at step 7" in text
