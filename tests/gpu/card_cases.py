"""What must run on a card as it runs on a processor: everything that is found by listing a folder, small.

Each `..._cases` yields (name, build, inputs): `build()` makes the thing on the processor, `inputs()` what it is given
there. `read_mixer`, `read_backbone`, `fill` and `short_run` do with both what a run does on a device, and return what
is to be compared.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from cl.backbones._spec import build_mixer, plugin, plugin_names
from cl.backbones._state import mapped
from cl.buffers.base import make_buffer
from cl.config import PRECISIONS, TrainerConfig
from cl.core import Batch, Setting, StreamInfo
from cl.hooks import ALL_SETTINGS
from cl.observe import Observer
from cl.seeding import Seeds
from cl.testing import BackboneContract, ToyNet, discover
from cl.testing.toy import toy_stream
from cl.trainer import Trainer
from strategies.naive import Naive

Case = tuple[str, Callable[[], object], Callable[[], object]]
WIDTH, HEADS, ROWS, TOKENS, SEPARATOR = 16, 2, 3, 13, 10
PIECES = (5, 1, 7)
STEPS = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# the cases


def mixer_cases() -> Iterator[Case]:
    """Every example of every mixer, with rules, cells and wrappers; rows of vectors, and where documents start."""
    for name in plugin_names("mixers"):
        for words in plugin("mixers", name, "").examples or (name,):
            yield words, partial(mixer, words), rows


def mixer(words):
    with Seeds(0).as_global("init"):
        made = build_mixer(words, width=WIDTH, num_heads=HEADS).double()
    return opened(made)


def opened(module):
    """What starts at zero, such as a closed gate, would hide what lies behind it."""
    drawn = generator(7)
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():
                p.copy_(0.3 * torch.randn(p.shape, generator=drawn))
    return module


def rows():
    reset = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    reset[0, 5] = reset[0, 6] = reset[1, 0] = reset[1, 9] = reset[0, TOKENS - 1] = True
    return torch.randn(ROWS, TOKENS, WIDTH, generator=generator(), dtype=torch.float64), reset


def backbone_cases() -> Iterator[Case]:
    """Every backbone in every setting it is for, in its small form."""
    for found in discover("cl.backbones"):
        kind = found.load()
        members = {"backbone": partial(kind, **getattr(kind, "toy", {}))}
        contract = type("Contract", (BackboneContract,), members)()
        for setting in sorted(getattr(kind, "settings", ALL_SETTINGS)):
            yield f"{found.name}-{setting}", partial(contract.build, setting), partial(contract.batch, setting)


def memory_cases() -> Iterator[Case]:
    """Every backbone that remembers: two blocks, and rows with documents in them."""
    info = StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (TOKENS,), 11, 1, measure="loss", separator=SEPARATOR)
    for found in discover("cl.backbones"):
        for kind in vars(found.module()).values():
            if hasattr(kind, "init_state") and kind.__module__ == found.module().__name__:
                options = {"width": 8, "num_heads": 2, "num_layers": 2} | getattr(kind, "toy", {})
                yield found.name, partial(decoder, kind, info, options), documents


def decoder(kind, info, options):
    with Seeds(0).as_global("init"):
        made = kind(info, **options).double()
    # weights of 0.02 hardly let one token feel another
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    return made


def documents():
    tokens = torch.randint(SEPARATOR, (ROWS, TOKENS), generator=generator())
    tokens[0, 4] = tokens[0, 8] = tokens[1, 6] = tokens[1, 7] = tokens[2, 0] = SEPARATOR
    return batch_of(tokens)


def batch_of(tokens):
    ids = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    return Batch(tokens, tokens.roll(-1, 1), ids, ids)


def buffer_cases() -> Iterator[Case]:
    """Every kind of buffer, and batches of which it cannot keep all rows."""
    for found in discover("cl.buffers"):
        if found.name != "base":
            yield found.name, partial(make_buffer, found.name, 10), batches


def batches():
    numbers = torch.arange(40)
    raw = numbers.to(torch.uint8).view(-1, 1).expand(-1, 8).contiguous()
    every = Batch(raw.float(), numbers % 4, numbers // 20, numbers, raw=raw)
    return [every[part] for part in torch.arange(40).split(8)]


def run_cases() -> Iterator[Case]:
    """Every strategy and every backbone in every setting it is for; `inputs()` is the rest of `short_run`."""
    for found in discover("strategies"):
        kind = found.load()
        network = LoraToy if "lora" in found.name else ToyNet
        yield from in_settings(found.name, partial(kind, **kind.contract.toy), network, kind.settings)
    for found in discover("cl.backbones"):
        kind = found.load()
        small = partial(kind, **getattr(kind, "toy", {}))
        yield from in_settings(found.name, Naive, small, getattr(kind, "settings", ALL_SETTINGS))


def in_settings(name, build, network, settings):
    """In full precision all settings, in half precision the first one."""
    for number, setting in enumerate(sorted(settings)):
        for precision in PRECISIONS if number == 0 else ("fp32",):
            yield f"{name}-{setting}-{precision}", build, partial(toy_run, network, setting, precision)


def toy_run(network, setting, precision):
    return network, toy_stream(setting), precision


class LoraToy(ToyNet):
    """The toy network with its weights frozen and an adapter beside each of them."""

    def __init__(self, info):
        super().__init__(info)
        from peft import LoraConfig, inject_adapter_in_model

        self.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["first", "head"]), self)


# what is done with them


def leaves(state):
    """Tensors of nested dicts, by path."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{path}", leaf) for path, leaf in leaves(value))
        else:
            yield name, value


def gradients(module, loss):
    """Of every parameter that the loss reaches."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {f"gradient of {name}": g for name, g in zip(named, found, strict=True) if g is not None}


def read_mixer(module, inputs, device, dtype=torch.float64):
    """Outputs of a text in pieces, the state at its end, and gradients through all of it."""
    module, (x, reset) = module.to(device, dtype), inputs
    state, outputs = None, []
    for piece, border in zip(x.to(device, dtype).split(PIECES, 1), reset.to(device).split(PIECES, 1), strict=True):
        y, state = module(piece, state, reset=border)
        state.pop("auxiliary", None)
        outputs.append(y)
    read = torch.cat(outputs, 1)
    weights = torch.randn(read.shape, generator=generator(1), dtype=torch.float64).to(device, dtype)
    return {"output": read, **dict(leaves(state)), **gradients(module, (read * weights).sum())}


def read_backbone(module, batch, device, dtype=torch.float64):
    """A training batch, twice where something is committed in between; then tokens in pieces where a state is kept."""
    module, batch = module.to(device, dtype).train(), batch.to(torch.device(device))
    if batch.inputs.is_floating_point():
        batch.inputs = batch.inputs.to(dtype)
    found = {}
    for turn in range(1 + getattr(module, "commits", False)):
        output = module(batch)
        loss = nn.functional.cross_entropy(output.logits.flatten(0, -2), batch.targets.flatten())
        found |= {f"{name}, turn {turn}": g for name, g in gradients(module, loss).items()}
        found[f"logits, turn {turn}"] = output.logits
        if getattr(module, "commits", False):
            module.commit(batch, output)
    found |= {f"buffer {name}": value for name, value in module.named_buffers()}
    if hasattr(module, "init_state") and batch.inputs.dim() == 2:
        state, cuts = None, (5, batch.inputs.shape[1] - 5)
        for number, piece in enumerate(batch.inputs.split(cuts, 1)):
            output = module.step(batch_of(piece), state)
            # as a loop that is truncated hands it on
            state = mapped(torch.Tensor.detach, output.state)
            found[f"logits, piece {number}"] = output.logits
        found |= {f"state {path}": leaf for path, leaf in leaves(state)}
    return found


def fill(buffer, given, device):
    """Columns after all batches, and what is drawn from them; on the device that the rows came from."""
    drawn = generator(3)
    for batch in given:
        buffer.add(batch.to(torch.device(device)), drawn, extra=batch.inputs[:, :2].to(device))
    held = buffer.rows(buffer.draw(4, drawn))
    assert {column.device for column in buffer.columns.values()} == {torch.device(device)}
    return {**buffer.columns, "drawn": held.inputs}


class Losses(Observer):
    """Total loss of every step."""

    def __init__(self):
        self.found = []

    def on_step(self, state, losses, lr):
        self.found.append(losses["loss"])


class Stop(Naive):
    """Asks for a stop after a step; observers hear of steps on a card when several are over."""

    def __init__(self, at):
        self.at, self.trainer = at, None

    def on_step_end(self, state, batch, output):
        if state.step == self.at:
            self.trainer.request_stop()


def short_run(strategy, network, stream, precision, device, run_dir=None, stop_at=None, resume=False):
    """Losses of a few steps of each experience, and the trainer when they are done."""
    watch, stop = Losses(), Stop(stop_at)
    trainer = Trainer(
        stream,
        network,
        [strategy, stop],
        optimizer=partial(torch.optim.SGD, lr=0.05),
        config=TrainerConfig(max_steps=STEPS, batch_size=16, eval_rows=32, device=device, precision=precision),
        run_dir=run_dir,
        observers=[watch],
    )
    stop.trainer = trainer
    trainer.run(resume=resume)
    return watch.found, trainer
