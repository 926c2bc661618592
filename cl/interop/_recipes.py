"""How each strategy of Avalanche is built around a backbone of ours."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl.core import StreamInfo
from cl.interop._network import LabelledNetwork, as_model, split
from cl.interop._quiet import quiet
from cl.interop._template import Template

with quiet():
    from avalanche.models import PNN, BaseModel, MlpVAE, SCRModel, VAE_loss
    from avalanche.models.packnet import PackNetModel
    from avalanche.training.plugins import GenerativeReplayPlugin
    from avalanche.training.supervised import VAETraining


@dataclass
class Parts:
    """What a template is made of.

    Args:
        kind: the class to build, hooks of ours included.
        optimizer: parameters -> optimizer.
        common: arguments that every template takes.
        options: the method's own arguments.
    """

    name: str
    kind: type
    backbone: nn.Module
    info: StreamInfo
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    common: dict[str, Any]
    options: dict[str, Any]

    def build(self, model: nn.Module | None, **more: Any) -> Any:
        """The template around a model, with the optimizer over its parameters and the cross-entropy."""
        given = self.common | self.options | more
        if model is not None:
            model.to(self.common["device"])
            given |= {"model": model, "optimizer": self.optimizer(model.parameters())}
        return self.kind(**({"criterion": nn.CrossEntropyLoss()} | given))

    @property
    def model(self) -> nn.Module:
        return as_model(self.backbone, self.info.num_heads)

    def split(self) -> tuple[nn.Module, nn.Linear]:
        return split(self.backbone, f"avalanche/{self.name}")


def plain(parts: Parts) -> Any:
    return parts.build(parts.model)


def joint(parts: Parts) -> Any:
    return parts.build(parts.model)


def online_naive(parts: Parts) -> Any:
    epochs = parts.common.pop("train_epochs")
    parts.common.pop("peval_mode", None)
    return parts.build(parts.model, train_passes=epochs)


def plugin(parts: Parts) -> Any:
    """A method that Avalanche ships as a plugin only."""
    made = parts.kind(**parts.options)
    parts.common["plugins"] = [*parts.common["plugins"], made]
    parts.kind, parts.options = Template, {}
    return parts.build(parts.model)


def cwr_star(parts: Parts) -> Any:
    return parts.build(parts.model, **({"cwr_layer_name": "backbone.head"} | parts.options))


def cope(parts: Parts) -> Any:
    num = parts.info.num_outputs
    # it looks for the last linear layer in the order of registration, where our head comes first
    return parts.build(TwoParts(*parts.split()), **({"n_classes": num, "p_size": num} | parts.options))


def gss(parts: Parts) -> Any:
    return parts.build(parts.model, **({"input_size": list(parts.info.input_shape)} | parts.options))


class TwoParts(nn.Sequential, BaseModel):
    """Features and a classifier, by the names that Avalanche looks for."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        nn.Sequential.__init__(self, OrderedDict(features=features, classifier=classifier))

    def get_features(self, inputs: Tensor) -> Tensor:
        return self.features(inputs)


def feature_replay(parts: Parts) -> Any:
    return parts.build(TwoParts(*parts.split()))


def lfl(parts: Parts) -> Any:
    return parts.build(TwoParts(*parts.split()))


def er_aml(parts: Parts) -> Any:
    features, head = parts.split()
    return parts.build(TwoParts(features, head), feature_extractor=features)


def icarl(parts: Parts) -> Any:
    features, head = parts.split()
    both = nn.ModuleList([features, head]).to(parts.common["device"])
    parts.common.pop("peval_mode", None)
    given = parts.common | parts.options
    return parts.kind(
        feature_extractor=features, classifier=head, optimizer=parts.optimizer(both.parameters()), **given
    )


def scr(parts: Parts) -> Any:
    features, head = parts.split()
    width = head.in_features
    projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, min(128, width)))
    model = SCRModel(feature_extractor=features, projection=projection).to(parts.common["device"])
    return parts.kind(model=model, optimizer=parts.optimizer(model.parameters()), **parts.common, **parts.options)


def slda(parts: Parts) -> Any:
    features, head = parts.split()
    features.to(parts.common["device"])
    sizes = {"input_size": head.in_features, "num_classes": parts.info.num_outputs}
    parts.common.pop("peval_mode", None)
    return parts.build(None, slda_model=features, **(sizes | parts.options))


def pnn(parts: Parts) -> Any:
    """It brings a network of its own, as wide as the backbone's features."""
    width = getattr(parts.backbone, "num_features", 100)
    return parts.build(PNN(1, math.prod(parts.info.input_shape), width))


def packnet(parts: Parts) -> Any:
    """One head for all tasks, whose part of the weights the task label chooses."""
    # PackNet puts what it is given into a list of its own, so a list would end up inside a list
    (parts.common["plugins"],) = parts.common["plugins"]
    return parts.build(PackNetModel(_one_head(parts)))


def _one_head(parts: Parts) -> nn.Module:
    heads = parts.backbone.head
    parts.backbone.head = heads.heads[0]
    return as_model(parts.backbone)


def lamaml(parts: Parts) -> Any:
    return parts.build(parts.model if parts.info.num_heads > 1 else LabelledNetwork(parts.backbone))


def generative_replay(parts: Parts) -> Any:
    if parts.options.get("generator_strategy") is None:
        parts.options["generator_strategy"] = _generator(parts)
    return parts.build(parts.model)


def _generator(parts: Parts) -> Any:
    """As Avalanche's default, which is for images of 28 x 28 only."""
    common = {key: parts.common[key] for key in ("train_mb_size", "train_epochs", "eval_mb_size", "device")}
    generator = MlpVAE(parts.info.input_shape, nhid=2, device=common["device"])
    wanted = [p for p in generator.parameters() if p.requires_grad]
    return VAETraining(
        model=generator,
        optimizer=torch.optim.Adam(wanted, lr=0.01, weight_decay=0.0001),
        criterion=VAE_loss,
        plugins=[GenerativeReplayPlugin()],
        evaluator=None,
        **common,
    )
