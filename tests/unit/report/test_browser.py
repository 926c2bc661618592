"""The page in a browser, where there is one: its scripts run without a word and draw every chart."""

import re
import shutil
import subprocess

import pytest

from cl.report.curves import view
from cl.report.html import page
from cl.report.load import sections

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs a browser")]

# what a reader does: hide and show, sort, choose, point
ACTIONS = """
<script>
window.addEventListener("load", () => {
  document.querySelectorAll(".legend button").forEach((button) => { button.click(); button.click(); });
  document.querySelectorAll("thead button").forEach((button) => { button.click(); button.click(); });
  document.querySelectorAll("select").forEach((select) => {
    for (const option of select.options) { select.value = option.value; select.dispatchEvent(new Event("change")); }
  });
  document.querySelectorAll(".pick").forEach((button) => button.click());
  document.querySelectorAll(".canvas svg").forEach((chart) => {
    const box = chart.getBoundingClientRect();
    for (let k = 0; k <= 10; k++) {
      const [x, y] = [box.left + (box.width * k) / 10, box.top + (box.height * k) / 10];
      const place = { clientX: x, clientY: y, bubbles: true };
      const target = document.elementFromPoint(x, y) || chart;
      target.dispatchEvent(new PointerEvent("pointermove", place));
      chart.dispatchEvent(new PointerEvent("pointermove", place));
    }
    chart.dispatchEvent(new PointerEvent("pointerleave", {}));
  });
  window.dispatchEvent(new Event("beforeprint"));
  window.dispatchEvent(new Event("afterprint"));
  document.title = "acted";
});
</script></body>"""


def open_in_browser(tmp_path, text, script=ACTIONS):
    path = tmp_path / "report.html"
    path.write_text(text.replace("</body>", script))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += ["--disable-sync", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run([BROWSER, *flags, profile, path.as_uri()], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, said


def results(make_result, kind):
    joint = {"experiences": ["all"], "trained": [-1]}
    if kind == "loss":
        changes = {"measure": "loss", "R_init": [4.0, 4.5]}
        many = [make_result(name, s, [[2.0, 4.0], [3.0, 2.0]], **changes) for name in ("naive", "<b>") for s in (0, 1)]
        return [*many, make_result("joint", 0, [[2.0, 2.0]], **changes, **joint)]
    if kind == "text":
        course = [[-1, 0, 0, 0.0], [0, 5, 1000, 0.1], [0, 10, 2000, 0.05], [1, 15, 3000, 0.1], [1, 20, 4000, 0.05]]
        changes = {"measure": "loss", "R_init": [4.0, 4.5], "course": course}
        inside = {"within": [[0, 5, 0, 3.0], [1, 15, 0, 2.5], [1, 15, 1, 3.0]]}
        rows = [[2.0, 4.0], [3.0, 2.0]]
        return [make_result("naive", s, rows, **changes, **inside) for s in (0, 1)] + [
            make_result("replay", 0, rows, **changes, **inside),
            make_result("<b>", 0, rows, measure="loss"),
        ]
    if kind == "long":
        R = [[0.9 - 0.004 * abs(i - j) for j in range(60)] for i in range(60)]
        return [make_result(name, 0, R) for name in ("naive", "replay")]
    if kind == "recurring":
        # ninety experiences on three classes in turn, which fade when they are left alone
        order = [i % 3 for i in range(90)]
        R = [[0.9 - 0.2 * ((i - j) % 3) for j in range(3)] for i in range(90)]
        again = {"trained": [-1] * 90, "practises": [[c] for c in order], "experiences": [f"class {c}" for c in order]}
        return [make_result(name, 0, R, **again) for name in ("naive", "replay")]
    if kind == "one":
        return [make_result("naive", 0, [[0.9]])]
    if kind == "extras":
        inside = [[0, 5, 0, 0.6], [1, 15, 0, 0.3], [1, 15, 1, 0.5]]
        many = [
            make_result(name, seed, [[0.9, 0.1], [last, 0.8]], within=inside)
            for name, last in (("naive", 0.4), ("replay", 0.8), ("ewc", 0.6), ("<b>", 0.5))
            for seed in range(5)
        ]
        return [*many, make_result("joint", 0, [[0.9, 0.9]], **joint)]
    return [
        make_result("naive"),
        make_result("joint", 0, [[0.9, 0.9]], **joint),
        make_result("ewc", R=[], status="failed"),
    ]


@pytest.mark.parametrize("kind", ["accuracy", "loss", "long", "one", "extras", "recurring", "text"])
def test_the_page_runs(tmp_path, make_result, kind):
    views = [view(section) for section in sections(results(make_result, kind))]
    dom, said = open_in_browser(tmp_path, page(views, "A title"))
    assert said == []
    assert "<title>acted</title>" in dom
    charts = dom.count('class="canvas"')
    assert charts > 0
    assert len(re.findall(r'class="canvas"><svg', dom)) == charts
    assert "NaN" not in re.sub(r"<script.*?</script>", "", dom, flags=re.S)


# what a finger does: a tap on a chart, the lift of the finger, which leaves, and a tap beside it
TAPS = """
<script>
window.addEventListener("load", () => {
  const tip = document.getElementById("tip");
  const seen = [...document.querySelectorAll(".canvas svg")].map((chart) => {
    const box = chart.getBoundingClientRect();
    const all = [chart, ...chart.querySelectorAll("g")];
    const middle = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
    const place = { ...middle, bubbles: true, pointerType: "touch" };
    return all.some((target) => {
      document.body.dispatchEvent(new PointerEvent("pointerdown", place));
      const before = tip.hidden;
      target.dispatchEvent(new PointerEvent("pointerdown", place));
      target.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "touch" }));
      const during = !tip.hidden;
      document.body.dispatchEvent(new PointerEvent("pointerdown", place));
      return before && during && tip.hidden;
    });
  });
  document.title = `taps: ${seen.join(" ")}`;
});
</script></body>"""


def test_a_tap_shows_numbers_until_the_next_one(tmp_path, make_result):
    text = page([view(section) for section in sections(results(make_result, "extras"))], "A title")
    dom, said = open_in_browser(tmp_path, text, TAPS)
    (title,) = re.findall("<title>(.*?)</title>", dom)
    assert said == [] and len(title.split()) > 6
    assert set(title.split()[1:]) == {"true"}


# pairs of texts of one chart that cover each other, and texts that leave their figure
OVERLAPS = """
<script>
window.addEventListener("load", () => {
  const found = [];
  for (const root of document.querySelectorAll(".canvas svg")) {
    const frame = root.closest("figure").getBoundingClientRect();
    const texts = [...root.querySelectorAll("text:not([transform])")];
    const boxes = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([name, a], i) => {
      if (a.left < frame.left || a.right > frame.right + 1) found.push(`${name} leaves`);
      for (const [other, b] of boxes.slice(i + 1)) {
        const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        if (width > 2 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4) found.push(`${name} over ${other}`);
      }
    });
  }
  document.title = `overlaps: ${found.join("; ") || "none"}`;
});
</script></body>"""


@pytest.mark.parametrize("kind", ["equal costs", "text"])
def test_no_text_covers_another_on_a_telephone(tmp_path, make_result, kind):
    if kind == "text":
        found = results(make_result, kind)
    else:
        last = [0.6 + 0.02 * k for k in range(15)]
        found = [make_result(f"name{k}", s, [[0.9, 0.1], [v, 0.8]]) for k, v in enumerate(last) for s in (0, 1)]
    text = page([view(section) for section in sections(found)], "A title")
    # headless windows are never narrower than 500, the page is
    narrow = "<style>body { width: 390px; }</style></head>"
    dom, _ = open_in_browser(tmp_path, text.replace("</head>", narrow, 1), OVERLAPS)
    assert re.findall("<title>(.*?)</title>", dom) == ["overlaps: none"]
