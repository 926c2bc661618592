"""Long streams of small class subsets that come back: does knowledge accumulate where every experience forgets?

Every experience shows a few of the data set's classes, and R has one column per class: measuring a stream of any length
costs one pass over the test set per experience. `final` is then the mean over classes of the full test set.

Source: Lesort et al., "Challenging Common Assumptions about Catastrophic Forgetting and Knowledge Accumulation", CoLLAs
2023 (SCoLe), and TLESORT/SCoLe-SCaling-Continual-Learning (sampling.py, main.py): sampling, imbalance and variants.
Their per-mini-batch mask of absent classes is `trainer.logit_mask=batch`, their clipping `trainer.clip_norm=10`, their
replay the strategy `frequency_replay`, their head without lengths `backbone.head=weight_norm`.
Differences: they hold out 10 % of the rows of every experience anew (here `eval_on=validation`, once); the second half
of `forgetting` starts at T / 2 and not one experience later; with 20 classes and more the step of the imbalance is
1 / C, where theirs (0.01) is the same for 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cl.core import Batch, Data, EvalSet, Experience, Setting, Stream, StreamInfo, TensorData, UserError
from cl.seeding import derive_seed
from streams._images import Images
from streams._options import image_stream
from streams._perturbed import SEVERITIES, kinds_for, perturbed
from streams._settings import require_choice, require_integer
from streams._subsets import KINDS, WEIGHTED, num_couples, subsets

MOST_SUBSETS = 1_000_000


@image_stream
def scole(
    images: Images,
    num_experiences: int = 100,
    classes_per_experience: int = 2,
    kind: str = "random",
    rows_per_class: int | None = None,
    entropy_decrease: float = 0.0,
    prob_reduction: float = 1.0,
    replaced_frac: float = 0.0,
    couples_frac: float = 1.0,
    perturbation: str = "none",
    severity: int | str = 1,
    seed: int = 0,
) -> Stream:
    """Build the stream; an experience holds row numbers, and copies of images only where they are perturbed.

    Args:
        images: in the place of this argument a call gives the arguments of `open_images`.
        kind: "random" draws every subset anew; "halves" draws from the first half of the classes in the first half of
            the stream and from the others after; "forgetting" draws from all, then from the first half only; "cycle"
            takes all subsets in order, over and over; "couples" draws from a share of the subsets; "iid" takes all
            classes every time.
        rows_per_class: rows of each class that an experience shows, drawn anew every time; None shows all.
        entropy_decrease: how unequal classes are drawn; 0 alike. For random and halves.
        prob_reduction: a drawn class's probability is divided by it; 1 leaves it. For random and halves.
        replaced_frac: probability that a class of a cycle is replaced by any class; two may then fall together. For
            cycle.
        couples_frac: share of all subsets that can occur. For couples.
        perturbation: what every experience does to its training images: "random" draws one for each experience, "none"
            among them; or the name of one (`streams._perturbed`). Held-out images stay clean.
        severity: of perturbations, from 1 to 5, or "random" for a draw per experience.
        seed: of the subsets, the rows and the perturbations.

    Raises:
        UserError: a value outside its range, or one that the kind does not have.
    """
    require_integer("stream.num_experiences", num_experiences)
    require_choice("stream.kind", kind, KINDS)
    most = images.num_classes // 2 if kind in ("halves", "forgetting") else images.num_classes
    _require_size(classes_per_experience, most, kind)
    if rows_per_class is not None:
        require_integer("stream.rows_per_class", rows_per_class)
    _require_number("entropy_decrease", entropy_decrease, 0.0, math.inf, 0.0, kind, WEIGHTED)
    _require_number("prob_reduction", prob_reduction, 1.0, math.inf, 1.0, kind, WEIGHTED)
    _require_number("replaced_frac", replaced_frac, 0.0, 1.0, 0.0, kind, ("cycle",))
    _require_number("couples_frac", couples_frac, 0.0, 1.0, 1.0, kind, ("couples",))
    _require_perturbation(perturbation, severity, images.shape[0])
    if num_couples(images.num_classes, classes_per_experience, couples_frac) < 1:
        raise UserError(
            f"stream.couples_frac is {couples_frac!r}, which leaves none of the "
            f"{math.comb(images.num_classes, classes_per_experience)} subsets of {classes_per_experience} classes"
        )
    if kind == "couples" and math.comb(images.num_classes, classes_per_experience) > MOST_SUBSETS:
        raise UserError(
            f"stream.classes_per_experience is {classes_per_experience}; {images.num_classes} classes have "
            f"{math.comb(images.num_classes, classes_per_experience):,} subsets of so many; kind=couples goes through "
            f"at most {MOST_SUBSETS:,}"
        )
    drawn = subsets(
        kind,
        num_experiences,
        images.num_classes,
        classes_per_experience,
        torch.Generator().manual_seed(derive_seed(seed, "subsets")),
        entropy_decrease=entropy_decrease,
        prob_reduction=prob_reduction,
        replaced_frac=replaced_frac,
        couples_frac=couples_frac,
    )
    pool = _Pool(images, list(drawn), rows_per_class, seed, perturbation, severity)
    return by_class(f"scole_{images.name}", images, pool.experiences())


def _require_size(size: int, most: int, kind: str) -> None:
    require_integer("stream.classes_per_experience", size)
    if size > most:
        raise UserError(f"stream.classes_per_experience is {size}; with kind {kind} there are {most} classes to take")


def _require_number(
    name: str, value: float, low: float, high: float, default: float, kind: str, kinds: tuple[str, ...]
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or math.isinf(value):
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise UserError(f"stream.{name} is {value!r}; it must be a number {limits}")
    if value != default and kind not in kinds:
        raise UserError(
            f"stream.{name} is {value!r}, which kind {kind} does not have; it must be {default:g} unless kind is "
            f"{' or '.join(kinds)}"
        )


def _require_perturbation(perturbation: str, severity: int | str, channels: int) -> None:
    require_choice("stream.perturbation", perturbation, ("random", *kinds_for(channels)))
    if severity not in ("random", *range(1, SEVERITIES + 1)) or isinstance(severity, bool):
        raise UserError(f"stream.severity is {severity!r}; it must be an integer from 1 to {SEVERITIES}, or random")
    if perturbation == "none" and severity != 1:
        raise UserError(f"stream.severity is {severity!r}, which nothing has while stream.perturbation is 'none'")


def class_name(c: int) -> str:
    """Domain of a class: its column of R."""
    return f"class {c}"


def by_class(
    name: str, images: Images, experiences: list[Experience], transform: Callable[[Tensor], Tensor] | None = None
) -> Stream:
    """A class-incremental stream that is measured on every class apart."""
    counts = images.eval_targets.bincount(minlength=images.num_classes).tolist()
    eval_sets = [
        EvalSet(class_name(c), partial(_held_out, images, c), count) for c, count in enumerate(counts) if count > 0
    ]
    info = StreamInfo(name, Setting.CLASS_INCREMENTAL, images.shape, images.num_classes, len(experiences))
    return Stream(info, experiences, eval_sets, transform or images.transform, images.augment)


def _held_out(images: Images, c: int) -> Data:
    rows = (images.eval_targets == c).nonzero().squeeze(1)
    return TensorData(images.eval_inputs.index_select(0, rows), images.eval_targets.index_select(0, rows))


@dataclass(frozen=True)
class Picked:
    """Some rows of a data set, by number.

    Args:
        inputs, targets: of the data set, or of these rows alone.
        index: (N,) where they are in those.
        sample_ids: (N,) row numbers of the data set.
        experience_id: (N,) the experience in which each row's class was first seen.
    """

    inputs: Tensor
    targets: Tensor
    index: Tensor
    sample_ids: Tensor
    experience_id: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, index: Tensor) -> Batch:
        where = self.index.index_select(0, index)
        return Batch(
            self.inputs.index_select(0, where),
            self.targets.index_select(0, where),
            self.experience_id.index_select(0, index),
            self.sample_ids.index_select(0, index),
        )


class _Pool:
    """What all experiences share: the images, who shows which class, and through what."""

    def __init__(
        self,
        images: Images,
        drawn: list[tuple[int, ...]],
        rows_per_class: int | None,
        seed: int,
        perturbation: str = "none",
        severity: int | str = 1,
    ) -> None:
        self.images, self.drawn, self.rows_per_class, self.seed = images, drawn, rows_per_class, seed
        self.perturbation, self.severity = perturbation, severity
        self.sizes = images.targets.bincount(minlength=images.num_classes).tolist()
        self.first: dict[int, int] = {}
        for k, classes in enumerate(drawn):
            for c in classes:
                self.first.setdefault(c, k)

    def experiences(self) -> list[Experience]:
        return [self._experience(k, classes) for k, classes in enumerate(self.drawn)]

    def _experience(self, k: int, classes: tuple[int, ...]) -> Experience:
        domain = f"{'class' if len(classes) == 1 else 'classes'} {' '.join(map(str, classes))}"
        kind, severity = self.change(k)
        return Experience(
            id=k,
            name=domain if kind == "none" else f"{domain}, {kind} {severity}",
            domain=domain,
            load=partial(self.load, k),
            num_samples=sum(min(self.rows_per_class or self.sizes[c], self.sizes[c]) for c in classes),
            classes=classes,
            practises=tuple(class_name(c) for c in classes),
        )

    def change(self, k: int) -> tuple[str, int]:
        """Perturbation and severity of an experience."""
        kinds = kinds_for(self.images.shape[0])
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "perturbation", k))
        kind, severity = (int(torch.randint(num, (), generator=generator)) for num in (len(kinds), SEVERITIES))
        return (
            kinds[kind] if self.perturbation == "random" else self.perturbation,
            severity + 1 if self.severity == "random" else int(self.severity),
        )

    def load(self, k: int) -> Data:
        picks, origins = [], []
        for c in self.drawn[k]:
            rows = (self.images.targets == c).nonzero().squeeze(1)
            if self.rows_per_class is not None:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "rows", k, c))
                rows = rows[torch.randperm(len(rows), generator=generator)[: self.rows_per_class]]
            picks.append(rows)
            origins.append(torch.full((len(rows),), self.first[c]))
        index, (kind, severity) = torch.cat(picks), self.change(k)
        if kind == "none":
            return Picked(self.images.inputs, self.images.targets, index, index, torch.cat(origins))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "perturbed", k))
        shown = perturbed(self.images.inputs[index], kind, severity, generator, self.images.largest)
        return Picked(shown, self.images.targets[index], torch.arange(len(index)), index, torch.cat(origins))
