"""What Avalanche 0.6.0 has, by name: its strategies and its classic benchmarks. Read without importing Avalanche.

The configs of `stream=avalanche/NAME` and `strategy=avalanche/NAME` are made from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TASK, CLASS, DOMAIN = "task_incremental", "class_incremental", "domain_incremental"
ALL = (TASK, CLASS, DOMAIN)
SUPERVISED = "avalanche.training.supervised"


@dataclass(frozen=True)
class Method:
    """One strategy of Avalanche.

    Args:
        line: what it is.
        target: dotted name of its class.
        recipe: function of `cl.interop._recipes` that builds it around a backbone.
        given: values for arguments that have no default there, and deliberate overrides.
        settings: where it makes sense.
        filled: arguments that follow from the stream and the backbone.
        needs_past: it cannot predict before it was trained on a domain, so only those seen are measured.
        remade: attributes that every experience makes anew, which a checkpoint leaves out.
        note: what a user should know.
        broken: why it does not run; empty where it does.
    """

    line: str
    target: str = ""
    recipe: str = "plain"
    given: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ALL
    filled: tuple[str, ...] = ()
    needs_past: bool = False
    remade: tuple[str, ...] = ()
    note: str = ""
    broken: str = ""


def _method(name: str, line: str, **options: Any) -> tuple[str, Method]:
    return name, Method(line, options.pop("target", f"{SUPERVISED}.{name}"), **options)


METHODS: dict[str, Method] = dict(
    [
        _method("AGEM", "Averaged gradient episodic memory.", given={"patterns_per_exp": 100}),
        _method(
            "CWRStar",
            "Copy weights with re-init: after the first experience only the last layer learns.",
            recipe="cwr_star",
            given={"cwr_layer_name": "backbone.head"},
            settings=(CLASS, DOMAIN),
        ),
        _method(
            "CoPE",
            "Continual prototype evolution.",
            recipe="cope",
            settings=(CLASS, DOMAIN),
            note="takes one step per experience: it is made for online streams",
        ),
        _method("Cumulative", "Train on all rows so far."),
        _method(
            "DER",
            "Dark experience replay (beta > 0: DER++), with logits taken at the end of an experience.",
            settings=(CLASS, DOMAIN),
        ),
        _method("ER_ACE", "Replay with an asymmetric cross-entropy.", settings=(CLASS, DOMAIN)),
        _method(
            "ER_AML",
            "Replay with asymmetric metric learning.",
            recipe="er_aml",
            settings=(CLASS, DOMAIN),
            remade=("replay_loader", "pos_neg_loaders"),
            note="the share of a class in its memory, `mem_size` over the classes, must fill a batch",
        ),
        _method("EWC", "Elastic weight consolidation.", given={"ewc_lambda": 1.0}),
        _method("FeatureReplay", "Replay of last-layer features.", recipe="feature_replay", settings=(CLASS, DOMAIN)),
        _method("FromScratchTraining", "Start from the initial weights at every experience."),
        _method("GDumb", "Train from scratch on a greedy balanced memory."),
        _method("GEM", "Gradient episodic memory.", given={"patterns_per_exp": 100}),
        _method("GSS_greedy", "Gradient-based sample selection.", recipe="gss", settings=(CLASS, DOMAIN)),
        _method(
            "GenerativeReplay",
            "Replay from a variational auto-encoder.",
            recipe="generative_replay",
            settings=(CLASS, DOMAIN),
        ),
        _method(
            "ICaRL",
            "Exemplars by herding, distillation, nearest class mean.",
            recipe="icarl",
            given={"memory_size": 200, "buffer_transform": None, "fixed_memory": True},
            settings=(CLASS,),
            needs_past=True,
        ),
        _method("JointTraining", "Train once on everything.", recipe="joint"),
        _method("LFL", "Less-forgetting learning.", recipe="lfl", given={"lambda_e": 1.0}, settings=(CLASS, DOMAIN)),
        _method(
            "LaMAML",
            "Look-ahead meta-learning (version 2).",
            target=f"{SUPERVISED}.lamaml_v2.LaMAML",
            recipe="lamaml",
            note="a batch must have rows for each of its `n_inner_updates`",
        ),
        _method("LwF", "Learning without forgetting.", given={"alpha": 1.0, "temperature": 2.0}),
        _method("MAS", "Memory aware synapses."),
        _method("MER", "Meta-experience replay.", note="one step per row: slow"),
        _method("MIR", "Maximally interfered retrieval.", given={"mem_size": 200, "subsample": 200}),
        _method("Naive", "Train on each experience in turn."),
        _method("OnlineNaive", "Naive under its old name for online streams.", recipe="online_naive"),
        _method("PNNStrategy", "Progressive neural networks.", recipe="pnn", settings=(TASK,), needs_past=True),
        _method(
            "PackNet",
            "Prune and freeze a part of the network for every task.",
            recipe="packnet",
            given={"post_prune_epochs": 1, "prune_proportion": 0.5},
            settings=(TASK,),
            needs_past=True,
        ),
        _method("RWalk", "Riemannian walk.", target="avalanche.training.plugins.RWalkPlugin", recipe="plugin"),
        _method("Replay", "Experience replay from a balanced memory."),
        _method(
            "SCR",
            "Supervised contrastive replay, nearest class mean.",
            recipe="scr",
            settings=(CLASS, DOMAIN),
            needs_past=True,
        ),
        _method(
            "StreamingLDA",
            "Streaming linear discriminant analysis.",
            recipe="slda",
            settings=(CLASS, DOMAIN),
            filled=("input_size", "num_classes"),
            note="the features are those of the untrained backbone; it is made for pretrained ones",
        ),
        _method(
            "SynapticIntelligence",
            "Synaptic intelligence.",
            given={"si_lambda": 1.0},
            note="repaired here: in Avalanche 0.6.0 it is naive training when the weights are on a CPU",
        ),
        _method("AETraining", "Training of an auto-encoder.", broken="trains a generator, which predicts no classes"),
        _method(
            "VAETraining",
            "Training of a variational auto-encoder.",
            broken="trains a generator, which predicts no classes",
        ),
        _method("AR1", "AR1 with latent replay.", broken="downloads MobileNet weights in its constructor"),
        _method(
            "BiC",
            "Bias correction.",
            broken="gives an experience other data, which 0.6 forbids, and a scheduler `verbose`, which torch removed",
        ),
        _method(
            "ExpertGateStrategy",
            "A gate of auto-encoders before experts.",
            broken="downloads AlexNet weights; its option to do without raises KeyError",
        ),
        _method(
            "LearningToPrompt",
            "Prompts for a vision transformer.",
            broken="needs the package `timm`, and downloads a pretrained transformer",
        ),
        _method(
            "LaMAML_v1",
            "Look-ahead meta-learning (version 1).",
            target=f"{SUPERVISED}.lamaml.LaMAML",
            broken="needs the package `higher`",
        ),
        _method(
            "ObjectDetectionTemplate",
            "Naive object detection.",
            target=f"{SUPERVISED}.naive_object_detection.ObjectDetectionTemplate",
            broken="is for boxes, not for classes",
        ),
    ]
)


@dataclass(frozen=True)
class Benchmark:
    """One classic benchmark.

    Args:
        line: what it is.
        given: values for arguments that have no default there.
    """

    line: str
    given: Mapping[str, Any] = field(default_factory=dict)


BENCHMARKS: dict[str, Benchmark] = {
    "CLEAR": Benchmark("Objects photographed over ten years.", {"data_name": "clear10"}),
    "CLStream51": Benchmark("Objects in videos, temporally correlated."),
    "CORe50": Benchmark("Objects in short videos."),
    "EndlessCLSim": Benchmark("A simulated city under changing light."),
    "OpenLORIS": Benchmark("Household objects seen by a robot."),
    "PermutedMNIST": Benchmark("MNIST with its pixels permuted.", {"n_experiences": 10}),
    "RotatedMNIST": Benchmark("MNIST rotated.", {"n_experiences": 5}),
    "SplitCIFAR10": Benchmark("CIFAR-10, some classes at a time.", {"n_experiences": 5}),
    "SplitCIFAR100": Benchmark("CIFAR-100, some classes at a time.", {"n_experiences": 10}),
    "SplitCIFAR110": Benchmark("CIFAR-10, then CIFAR-100 in parts.", {"n_experiences": 11}),
    "SplitCUB200": Benchmark("Birds, some species at a time.", {"n_experiences": 10}),
    "SplitFMNIST": Benchmark("Fashion-MNIST, some classes at a time.", {"n_experiences": 5}),
    "SplitImageNet": Benchmark("ImageNet, some classes at a time.", {"n_experiences": 10}),
    "SplitInaturalist": Benchmark("Photographs of species, by super-category."),
    "SplitMNIST": Benchmark("MNIST, some classes at a time.", {"n_experiences": 5}),
    "SplitOmniglot": Benchmark("Letters, some alphabets at a time.", {"n_experiences": 10}),
    "SplitTinyImageNet": Benchmark("Tiny ImageNet, some classes at a time.", {"n_experiences": 10}),
}
"""Every classic benchmark that yields labelled images; `CLEARMetric` is a function of results and the three `ExML`
benchmarks yield trained models instead of images."""


OWN = "own"
"""Config of a benchmark that a function of the user's builds; the command line puts its dotted name in."""


def configs() -> dict[tuple[str, str], dict[str, Any]]:
    """(group, name) -> config node, for every name that can be chosen."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, method in METHODS.items():
        target = {"_target_": f"cl.interop.avalanche.{name}"}
        found["strategy/avalanche", name] = {"strategy": {node_name(name): target | dict(method.given)}}
    for name, benchmark in {**BENCHMARKS, OWN: Benchmark("")}.items():
        target = {"_target_": "cl.interop.avalanche.stream", "name": name, "root": "${data.root}", "seed": "${seed}"}
        found["stream/avalanche", name] = {"stream": target | dict(benchmark.given)}
    return found


def node_name(name: str) -> str:
    """Config node of a strategy of Avalanche, which also names it in tables.

    Example:
        >>> node_name("EWC"), node_name("my_lab.Mine")
        ('avalanche_EWC', 'avalanche_Mine')
    """
    return f"avalanche_{name.rpartition('.')[2]}"


BEGIN, END = "<!-- strategies: made by `make docs` -->\n", "<!-- end of strategies -->"


def markdown() -> str:
    """The table of strategies for docs/avalanche.md."""
    short = {TASK: "task", CLASS: "class", DOMAIN: "domain"}
    rows = ["| `strategy=avalanche/...` | what it is | settings | note |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        settings = "does not run" if method.broken else ", ".join(short[setting] for setting in method.settings)
        given = ", ".join(f"`{key}={value}`" for key, value in method.given.items())
        notes = [f"it {method.broken}" if method.broken else method.note, f"here {given}" if given else ""]
        rows.append(f"| `{name}` | {method.line} | {settings} | {'; '.join(note for note in notes if note)} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """A page with the table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}{markdown()}{END}{rest.partition(END)[2]}"
