"""The language study: how much of earlier domains replay, GeRe's losses, learning rates and schedules save.

    python benchmarks/study_language.py --data DIR [--out runs/language] [--page docs/comparisons/language] [--seeds 3]
        [--width 512 --layers 8 --words stream.train_tokens=null ...]

Two streams: `builtin` (docs, then code, then arithmetic; bytes; a decoder of 0.38 million weights for 500, 150 and 150
steps, the protocol whose single-seed numbers are to be confirmed or corrected) and `local` (C4, then WikiText, then
GSM8K from files below DIR; a BPE of 1,024 tokens; 1.1 million weights for 120 steps each). On each:

- strategies: naive, replay of 1, 5 and 25 % of the tokens, GeRe with 200 rows of the first domain and each of its
  losses (the model is not pretrained, so the original model is the one after the first domain);
- naive with a learning rate chosen on validation documents and a seed of its own: the reference that any gain has to
  beat, since much forgetting is a learning rate that is too large;
- schedules, without replay and with 5 %.

Every condition is one `cl compare` of one composition (this file only writes its command), so the same command goes on
where it was stopped; the page is made from the results on disk, whatever there is of them. `--width` and `--layers`
are those of other networks, `--words` adds overrides: give such runs an `--out` and a `--page` of their own. `--quick`
is a trial of everything at a size that means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from _study import TUNE_ON_TEXT, Comparisons, chosen, finished, spread, table

from cl.result import Result

RATES = "{optimizer.lr: [0.0002, 0.0005, 0.001, 0.004]}"
COMMON = ("trainer.eval_batch_size=64", "trainer.eval_rows=128", "tracking=none")

STREAMS: Mapping[str, Sequence[str]] = {
    "builtin": ("+experiment=builtin_text",),
    "local": ("+experiment=text_local", "schedule=rewarmed_cosine", "backbone.num_layers=5", "trainer.max_steps=120"),
}
TUNE_ON = {"builtin": "stream.eval_on=validation", "local": TUNE_ON_TEXT}
QUICK = {
    "builtin": ("stream.train_tokens=6400", "stream.eval_tokens=2000"),
    "local": ("trainer.max_steps=4", "stream.eval_tokens=2000"),
}

GERE = (
    "strategy.gere.source=first",
    "strategy.gere.samples=200",
    "strategy.gere.general_batch_size=2",
)
REPLAY_5 = ("token_replay", ("strategy.token_replay.rate=5", "strategy.token_replay.capacity=6000"))
SCHEDULES: Mapping[str, Sequence[str]] = {
    "rewarmed_cosine": (),
    "infinite": ("schedule=infinite",),
    "constant": ("schedule=constant",),
    "cosine": ("schedule=cosine",),
    "warmup_stable_decay": ("schedule=warmup_stable_decay",),
    "inverse_square_root": ("schedule=inverse_square_root",),
    "autoregressive": ("schedule=autoregressive",),
}

READING = """What three seeds of `builtin` say:

- The numbers of one seed hold: replay of 5 % avoids most of the rise, and 200 rows of the first domain keep `code` too,
  which nothing replays. Naive training is many times the spread over seeds away from replay, at any share, and from
  GeRe; replay of 25 % and GeRe's losses are closer to each other.
- Imitating what the first model said (KL) is the best anchor of `docs`, ahead of L1 and L2 on the states and of the
  margin loss (weight 1), which cannot be told apart, and of labels alone; `code` is kept best by replaying it, at 25 %.
  The margin loss costs 0.2 bits on the last domain; on the one seed before it had gained nothing over labels.
- Choosing naive's rate by the mean over all domains takes the lowest rate on offer: it avoids the rise by learning
  less, and ends behind replay of 5 % and behind every GeRe on every domain.
- Without replay a schedule keeps `docs` only as far as it learns less afterwards: one cosine over the whole run avoids
  78 % of the rise and pays 1.2 bits on `arithmetic`, the inverse square root and the auto-regressive schedule 40 % for
  0.2 bits, the infinite one 21 % for 0.04; a constant rate and warm-up-stable-decay keep nothing.
- With 5 % of replay warm-up-stable-decay ends below the re-warmed cosine on every domain (`docs` 3.62 and 3.99,
  `arithmetic` 0.80 and 0.84), and so, by less, does a constant rate.

And of `local`, where naive training loses only 0.15 bits of `c4`:

- A share above 100 % went on getting better at `c4` after its own experience, one below 0 lost more since then than
  naive; ends are what to read, since schedules also differ in how far they had come.
- Replay of 25 % ends lowest on `c4` and `wikitext` and costs nothing on `gsm8k`. GeRe's rows keep `c4`, and of
  `wikitext` little: labels and KL best, L1, L2 and the margin loss at 0.1 to 0.2 bits of `gsm8k`.
- With 5 % of replay warm-up-stable-decay again ends below the re-warmed cosine on all three domains.
"""

Condition = tuple[str, Sequence[str]]
"""A strategy and its settings."""

BEFORE = {"replay 5 %": 78, "replay 25 %": 92, "gere, ce": 88, "gere, tm": 88, "gere, l2": 90, "gere, kl": 93}
"""Percent of the first domain's rise that was avoided on one seed, other texts of the same three kinds, before this."""


def strategies() -> dict[str, Condition]:
    """The conditions of the first table, by name."""
    found: dict[str, Condition] = {"naive": ("naive", ()), "naive, rate chosen": ("naive", (f"tune={RATES}",))}
    for rate in (1, 5, 25):
        words = (f"strategy.token_replay.rate={rate}", "strategy.token_replay.capacity=6000")
        found[f"replay {rate} %"] = ("token_replay", words)
    for loss in ("ce", "kl", "l1", "l2", "tm"):
        found[f"gere, {loss}"] = ("gere", (*GERE, f"strategy.gere.loss={loss}"))
    return found


def schedules() -> dict[str, Condition]:
    """The conditions of the second table; the first schedule is that of the first table, so its runs are those."""
    found: dict[str, Condition] = {}
    for name, words in SCHEDULES.items():
        found[f"{name}, no replay"] = ("naive", words)
        found[f"{name}, replay 5 %"] = (REPLAY_5[0], (*REPLAY_5[1], *words))
    return found


@dataclass(frozen=True, kw_only=True)
class Language(Comparisons):
    """The runs of the study.

    Args:
        width, layers: of the decoder; 0 takes those of the stream.
        words: more overrides for every run.
    """

    out: Path = Path("runs/language")
    page: Path = Path("docs/comparisons/language")
    seeds: int = 3
    jobs: int = 2
    width: int = 0
    layers: int = 0
    words: Sequence[str] = ()
    is_quick: bool = False

    @property
    def size(self) -> tuple[str, ...]:
        """Words beside those of the stream, behind them."""
        named = {"backbone.width": self.width, "backbone.num_layers": self.layers}
        return (*(f"{name}={value}" for name, value in named.items() if value), *self.words)

    def folder(self, stream: str, condition: Condition) -> Path:
        """Of a condition; conditions of the same words share their runs."""
        strategy, words = condition
        parts = [word.partition("=")[2] if word[0] != "t" else "tuned" for word in words]
        return self.out / stream / "-".join([strategy, *parts]).replace("/", "_")

    def train(self, stream: str, condition: Condition) -> None:
        """The runs of a condition."""
        strategy, words = condition
        tune_on = (f"tune_on={TUNE_ON[stream]}",) if any(word.startswith("tune=") for word in words) else ()
        quick = QUICK[stream] if self.is_quick else ()
        folder = self.folder(stream, condition)
        self.compare(folder, [strategy], *STREAMS[stream], *COMMON, *quick, *self.size, *words, *tune_on)

    def results(self, stream: str, condition: Condition) -> list[Result]:
        """Finished runs, in the order of their seeds."""
        return finished(self.folder(stream, condition))[: self.seeds]


def bits(run: Result) -> list[list[float]]:
    """R in bits per byte, with the measurement before training as the first row."""
    scale = [t / (b * math.log(2)) for t, b in zip(run.num_tokens, run.num_bytes, strict=True)]
    return [[value * s for value, s in zip(row, scale, strict=True)] for row in (run.R_init, *run.R)]


def results_table(study: Language, stream: str, conditions: Mapping[str, Condition]) -> str:
    """Bits per byte at the end on every domain, and how much of naive training's loss on the first one is avoided."""
    naive = study.results(stream, ("naive", ()))
    if not naive:
        return "Not run yet.\n"
    domains, last = naive[0].domains, len(naive[0].R)
    head = ("condition", *domains, f"rise of {domains[0]} avoided", "one seed, before", "updates", "seeds")
    rows, absent = [], []
    for name, condition in conditions.items():
        runs = study.results(stream, condition)
        if not runs:
            absent.append(name)
            continue
        ends = [[bits(run)[last][j] for run in runs] for j in range(len(domains))]
        paired = {run.seed: rise(run) for run in naive}
        avoided = [1 - rise(run) / paired[run.seed] for run in runs if paired.get(run.seed, 0) > 0]
        share = f"{100 * fmean(avoided):.0f} %" if avoided and name != "naive" else ""
        words = ", ".join(chosen(study.folder(stream, condition)))
        title = f"{name} ({words})" if words else name
        before = f"{BEFORE[name]} %" if stream == "builtin" and name in BEFORE and not study.size else ""
        updates = f"{runs[0].cost['updates']:,.0f}"
        rows.append((title, *(spread(each, ".2f") for each in ends), share, before, updates, str(len(runs))))
    missing = f"\nNot run yet: {'; '.join(absent)}.\n" if absent else ""
    return table(head, rows) + missing


def rise(run: Result) -> float:
    """Bits per byte that the first domain lost after its own experience."""
    measured = bits(run)
    return measured[-1][0] - measured[1][0]


def page(study: Language) -> str:
    """The Markdown page."""
    # what was read off the runs of the default size says nothing of others
    added = f" Beside the words of the streams: `{' '.join(study.size)}`." if study.size else ""
    parts = [
        "# Language: replay, GeRe and schedules\n",
        f"Made by `python benchmarks/study_language.py --data DATA --seeds {study.seeds}`; how it is done is in that "
        f"file's docstring.{added} Bits per byte on held-out text after the last experience, lower is better; mean and "
        "standard deviation over seeds. `general` and `shakespeare` are never trained on. The rise that is avoided "
        "compares, seed by seed, what the first domain lost since its own experience with what it lost under naive "
        "training. GeRe's original model is the one after the first domain, its rows are 200 of that domain, two "
        "beside every step of 16.\n",
        *(() if study.size else (READING,)),
    ]
    for stream in STREAMS:
        parts += [f"## {stream}: strategies\n", results_table(study, stream, strategies())]
        parts += [f"## {stream}: schedules\n", results_table(study, stream, schedules())]
    return "\n".join(parts)


def main() -> None:
    """Run what is not done, then write the page."""
    parser = Language.options(__doc__)
    parser.add_argument("--streams", default=",".join(STREAMS))
    parser.add_argument("--only", default="", help="conditions whose names hold this text")
    given = parser.parse_args()
    study = Language.of(given)
    for stream in () if given.page_only else given.streams.split(","):
        for name, condition in {**strategies(), **schedules()}.items():
            if given.only in name:
                study.train(stream, condition)
    study.write(page(study))


if __name__ == "__main__":
    main()
