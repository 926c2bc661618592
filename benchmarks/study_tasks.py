"""The sequence of text-classification tasks on a small pretrained model: what general replay saves of earlier tasks.

    python benchmarks/study_tasks.py --data DIR [--out runs/tasks] [--page docs/comparisons/text_tasks] [--seeds 3]

A Llama of 0.4 million weights is pretrained by `cl run` on the local general text (C4, WikiText and Shakespeare below
DIR, one mixture, a BPE of 1,024 tokens), written as a folder that transformers reads, and trained on the twelve local
tasks of O-LoRA's fifteen, in their order. Conditions:

- naive, and naive with a learning rate chosen on held-out training rows and a seed of its own;
- replay of 5 % of the tokens, from rows of earlier tasks;
- GeRe with KL and with margins (tm); its general rows are C4 documents that the model was not pretrained
  on. Nothing of earlier tasks is kept;
- joint: all tasks at once, as many steps.

The pretrained model is the same for all; seeds differ in the order of rows and in what strategies draw. Every condition
is one `cl compare`, so the same command goes on where it was stopped; the page is made from what is on disk. `--quick`
is a trial of everything at a size that means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from _study import Comparisons, chosen, finished, interval, run_to_the_end, spread, student, table

from cl.metrics.statistics import ALPHA, holm
from cl.result import Result, write_text

LLAMA = (
    "{model_type: llama, hidden_size: 96, intermediate_size: 256, num_hidden_layers: 3, num_attention_heads: 4, "
    "num_key_value_heads: 4, tie_word_embeddings: true}"
)
GENERAL = (
    "[{name: c4, path: text/c4/train.jsonl, eval_path: text/c4/validation.jsonl}, "
    '{name: wikitext, path: text/wikitext/train.txt, starts: "^ = [^=].* = $"}, '
    '{name: shakespeare, path: text/shakespeare/train.txt, starts: "^[A-Z][A-Za-z ]*:$"}]'
)
COMMON = (
    "optimizer=adamw", "optimizer.betas=[0.9,0.95]", "optimizer.weight_decay=0.1", "trainer.clip_norm=1.0",
    "trainer.batch_size=16", "trainer.eval_batch_size=128", "stream.context=96", "tracking=none",
)  # fmt: skip
PRETRAIN = (
    "stream=text_domains", f"stream.domains={GENERAL}", "stream.order=[[c4,wikitext,shakespeare]]",
    "stream.tokenizer=bpe", "stream.vocabulary=1024", "stream.eval_tokens=20000", "backbone=hf",
    f"backbone.config={LLAMA}", "schedule=cosine", "schedule.warmup_frac=0.02", "optimizer.lr=0.003",
)  # fmt: skip
TASKS = (
    "stream=text_tasks", "stream.general={name: c4, path: text/c4/validation.jsonl}", "backbone=hf",
    "stream.template='{text} Answer:'", "schedule=rewarmed_cosine", "optimizer.lr=0.001", "trainer.evaluate=seen",
)  # fmt: skip
ROWS = (400, 60)
QUICK_ROWS = (16, 4)
"""Rows of each task to train and to measure on."""
RATES = "{optimizer.lr: [0.0003, 0.001, 0.003]}"
GERE = ("strategy.gere.samples=200", "strategy.gere.general_batch_size=2")

CONDITIONS: dict[str, tuple[str, Sequence[str]]] = {
    "naive": ("naive", ()),
    "naive, rate chosen": ("naive", (f"tune={RATES}", "tune_on=stream.eval_on=validation")),
    "replay 5 %": ("token_replay", ("strategy.token_replay.rate=5", "strategy.token_replay.capacity=1200")),
    "gere, kl": ("gere", (*GERE, "strategy.gere.loss=kl")),
    "gere, tm": ("gere", (*GERE, "strategy.gere.loss=tm")),
    "joint": ("joint", ()),
}
"""A strategy and its settings, by name."""


@dataclass(frozen=True, kw_only=True)
class Tasks(Comparisons):
    """The runs of the study, and what they are started from."""

    out: Path = Path("runs/tasks")
    page: Path = Path("docs/comparisons/text_tasks")
    seeds: int = 3
    is_quick: bool = False

    @property
    def model(self) -> Path:
        """Folder of the pretrained model."""
        return self.out / "model"

    def pretrain(self) -> None:
        """Train the model on general text and write it as transformers reads it; nothing where that is done."""
        run, cache = self.out / "pretrained", self.out / "cache"
        budget = "trainer.max_steps=8" if self.is_quick else "trainer.max_tokens=2000000"
        here = (f"data.root={self.data}", f"stream.cache={cache.resolve()}", "seed=0")
        run_to_the_end(run, [*COMMON, *PRETRAIN, budget, *here])
        if not (self.model / "tokenizer.json").is_file():
            export(run, self.model)
            (tokenizer,) = (cache / "tokenizers").glob("*.json")
            write_text(self.model / "tokenizer.json", tokenizer.read_text())

    def train(self, name: str) -> None:
        """The runs of a condition."""
        strategy, words = CONDITIONS[name]
        model = self.model.resolve()
        train_rows, eval_rows = QUICK_ROWS if self.is_quick else ROWS
        size = (f"stream.train_rows={train_rows}", f"stream.eval_rows={eval_rows}")
        same = (f"backbone.pretrained={model}", f"stream.tokenizer={model}", *size)
        self.compare(self.folder(name), [strategy], *COMMON, *TASKS, *same, *words)

    def folder(self, name: str) -> Path:
        """Of a condition."""
        return self.out / "-".join(name.replace(",", "").replace(" %", "").split())

    def results(self, name: str) -> list[Result]:
        """Finished runs, in the order of their seeds."""
        return finished(self.folder(name))[: self.seeds]


def export(run: Path, folder: Path) -> None:
    """The model of a run with `backbone=hf`, as transformers writes models."""
    from cl.cli import build
    from cl.cli.folder import saved_config

    trainer = build.make_trainer(saved_config(run), {}, run, ())
    trainer.keeper.restore()
    trainer.state.model.model.save_pretrained(folder)


def results_table(study: Tasks) -> str:
    """Accuracy on the twelve tasks: at the end, beside naive's, just after each was learnt, and the difference."""
    head = (
        *("condition", "average performance", "less naive's", "just after each task", "forgetting"),
        *("rows trained on, against naive's", "seeds"),
    )
    rows, plain = [], study.results("naive")
    for name in CONDITIONS:
        runs = study.results(name)
        words = ", ".join(chosen(study.folder(name)))
        learnt = [fmean(run.R[i][j] for i, j in enumerate(run.trained)) for run in runs] if name != "joint" else []
        lost = [a - b for a, b in zip(learnt, ends(runs), strict=bool(learnt))]
        apart = differences(study, name) if name != "naive" else []
        work = fmean(run.cost["backwards"] for run in runs) / plain[0].cost["backwards"] - 1 if runs and plain else 0.0
        beside = interval([100 * each for each in apart], ".1f")
        accuracies = (percent(ends(runs)), beside, percent(learnt), percent(lost))
        rows.append((f"{name} ({words})" if words else name, *accuracies, f"{work:+.1%}", str(len(runs))))
    return table(head, rows)


def ends(runs: Sequence[Result]) -> list[float]:
    """Mean accuracy over the tasks after the last one."""
    return [fmean(run.R[-1]) for run in runs]


def differences(study: Tasks, name: str) -> list[float]:
    """Average performance less that of naive with the same seed."""
    plain = {run.seed: end for run, end in zip(study.results("naive"), ends(study.results("naive")), strict=True)}
    runs = study.results(name)
    return [end - plain[run.seed] for run, end in zip(runs, ends(runs), strict=True) if run.seed in plain]


def answer(study: Tasks) -> str:
    """Which conditions end elsewhere than naive, with Holm's adjustment over them."""
    asked = {name: differences(study, name) for name in CONDITIONS if name != "naive"}
    asked = {name: apart for name, apart in asked.items() if len(apart) > 1}
    if not asked:
        return ""
    ps = holm([student(apart)[2] for apart in asked.values()])
    found = [
        f"{name} ({'higher' if fmean(apart) > 0 else 'lower'}, p = {p:.3f})"
        for (name, apart), p in zip(asked.items(), ps, strict=True)
        if p < ALPHA
    ]
    return (
        f"Elsewhere than naive at the end (Student's t on pairs of seeds, Holm over {len(asked)}, below {ALPHA:g}): "
        f"{', '.join(found) or 'none'}. Three seeds find large differences only.\n"
    )


def by_task(study: Tasks) -> str:
    """Accuracy on every task at the end, in percent, means over seeds."""
    known = {name: study.results(name) for name in CONDITIONS if study.results(name)}
    if not known:
        return ""
    domains = next(iter(known.values()))[0].domains
    lines = [f"| condition | {' | '.join(domains)} |", "|---" * (len(domains) + 1) + "|"]
    for name, runs in known.items():
        ends = [fmean(run.R[-1][j] for run in runs) for j in range(len(domains))]
        lines.append(f"| {name} | {' | '.join(f'{100 * end:.0f}' for end in ends)} |")
    return "\n".join(lines) + "\n"


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return spread([100 * value for value in values], ".1f")


def page(study: Tasks) -> str:
    """The Markdown page."""
    return "\n".join(
        [
            "# Twelve text-classification tasks in sequence\n",
            f"Made by `python benchmarks/study_tasks.py --data DATA --seeds {study.seeds}`; how it is done is in that "
            "file's docstring. Accuracy in percent by likelihood (the most likely of all possible answers), mean and "
            "standard deviation over seeds; average performance is the mean over the twelve tasks after the last. "
            "`just after each task` is the accuracy on each task when it had just been trained, forgetting the "
            f"difference. At most {ROWS[0]} training rows and {ROWS[1]} test rows of each task, one epoch; a standard "
            "error of about 1.8 points on the average comes from the number of test rows alone, but the rows are the "
            "same for all.\n",
            results_table(study),
            answer(study),
            "## At the end, task by task\n",
            by_task(study),
        ]
    )


def main() -> None:
    """Run what is not done, then write the page."""
    parser = Tasks.options(__doc__)
    parser.add_argument("--only", default="", help="conditions whose names hold this text")
    given = parser.parse_args()
    study = Tasks.of(given)
    if not given.page_only:
        study.pretrain()
        for name in CONDITIONS:
            if given.only in name:
                study.train(name)
    study.write(page(study))


if __name__ == "__main__":
    main()
