"""Any causal language model of transformers: from the hub, from a folder, or drawn anew from a config; full or LoRA.

Documents packed in a row are kept apart by positions that begin anew, from which a model makes masks of its own (its
sliding windows among them), or by a block-diagonal mask where it does not. Whether a model heeds them is tried when it
is built, so that a model which cannot (a recurrent one, a linear attention) is not trained across borders without
anybody knowing. Code that a repository brings along, or that its config names, is never run.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones._hf_models import DTYPES, drawn, first_line, loaded, require_positions
from cl.backbones._lora import lora_options, merge_adapters
from cl.backbones.gpt import TEXT, require_tokens
from cl.core import Batch, Output, StreamInfo, UserError
from cl.frozen import Given

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


class Hf(nn.Module):
    """A causal language model of transformers as a backbone; `model` is the model itself, or peft's around it.

    Args:
        pretrained: hub id or folder of a model with its weights; None draws weights for `config`.
        config: values of the model's config, `model_type` among them, such as {model_type: gpt2, n_embd: 128}; the
            vocabulary is the stream's. None takes a Llama of 0.1 million weights. Not with `pretrained`.
        revision: commit, branch or tag on the hub.
        lora: {rank, alpha, dropout, target_modules} trains adapters of peft and freezes the rest; None trains all.
        adapter: name of the first adapter; strategies add others with `model.add_adapter`.
        is_separated: keep packed documents apart; false lets a model read across their borders, for those that cannot
            but.
        is_checkpointed: compute layers again in the backward pass in place of keeping what they computed.
        download: fetch a model that is on the hub and not on this machine.
        dtype: of the model's own weights, and of what they compute: float32, or bfloat16 or float16 for one that is
            trained through adapters, which stay float32.

    Raises:
        UserError: a model that cannot be had or lacks weights, whose vocabulary or tokenizer is not the stream's, that
            reads across documents or ahead, or has too few positions, or a value outside its range.

    Cost: as the model's; float32 weights are computed in the trainer's precision.
    """

    settings = TEXT

    def __init__(
        self,
        info: StreamInfo,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        revision: str | None = None,
        lora: dict[str, Any] | None = None,
        adapter: str = "default",
        is_separated: bool = True,
        is_checkpointed: bool = False,
        download: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        require_tokens(info, "hf")
        if dtype not in DTYPES:
            raise UserError(f"backbone.dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        if dtype != "float32" and lora is None:
            raise UserError(
                f"backbone.dtype is {dtype!r} and every weight is trained, which would lose small updates; train "
                "adapters ('backbone.lora={rank: 8}'), or keep float32 and compute in trainer.precision=bf16"
            )
        if pretrained is not None and config is not None:
            raise UserError("backbone.pretrained and backbone.config are both set; a model comes from one of them")
        if pretrained is not None and not (isinstance(pretrained, str) and pretrained):
            raise UserError(f"backbone.pretrained is {pretrained!r}; it must be the folder or the hub id of a model")
        self.separator = info.separator if is_separated else None
        if pretrained is None:
            if config is not None and not isinstance(config, Mapping):
                raise UserError(f"backbone.config is {config!r}; it must be a mapping such as {{model_type: gpt2}}")
            model = drawn(dict(TINY if config is None else config), info, DTYPES[dtype])
        else:
            model = loaded(pretrained, revision, info, DTYPES[dtype], download)
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
        found = {id(p) for p in model.parameters()} if pretrained else set()
        if lora is not None:
            model = _with_lora(model, lora, adapter)
        self.model = model
        # adapters have put these below other names
        names = (name for name, p in self.named_parameters(remove_duplicate=False) if id(p) in found)
        self.given = Given(pretrained or "", frozenset(names))
        self._has_head_input = self._is_masked = False
        name = pretrained or str(model.config.model_type)
        require_positions(model.config, name, info)
        self._try(info, name)

    def forward(self, batch: Batch) -> Output:
        """Logits for every token; `hidden` is what the model's head reads, where the model tells."""
        found = self._read(batch.inputs)
        hidden_BTD = found.hidden_states[-1] if self._has_head_input else None
        return Output(found.logits, hidden_BTD)

    def write(self, folder: Path) -> None:
        """Save the model as transformers does, adapters merged into its weights, which ends its training."""
        model: Any = merge_adapters(self.model)
        model.config.use_cache = True
        model.save_pretrained(folder)

    def _read(self, tokens_BT: Tensor) -> Any:
        """What the model says, documents kept apart in the way that it heeds."""
        masks = {}
        if self.separator is not None:
            masks = separated(tokens_BT, self.separator, next(self.model.parameters()).dtype, self._is_masked)
        return self.model(input_ids=tokens_BT, output_hidden_states=True, use_cache=False, **masks)

    def _try(self, info: StreamInfo, name: str) -> None:
        """See on a few tokens that nothing ahead is read, how documents stay apart, and which state the head reads."""
        was_training = self.training
        self.eval()
        first, last = [token for token in range(3) if token != info.separator][:2]
        rows = torch.tensor([[first] * 3 + [last] * 3, [last] * 3 + [last] * 3, [first] * 5 + [last]])
        with torch.inference_mode():
            try:
                plain = self.model(input_ids=rows[[0, 2]], use_cache=False).logits
            except Exception as error:  # of models that read more than tokens, each in its own words
                raise UserError(f"model {name} cannot read plain tokens: {first_line(error)}") from None
            if not plain.isfinite().all():
                raise UserError(f"model {name} has weights with which it predicts no finite numbers")
            if not self._near(plain[0, :3], plain[1, :3]):
                raise UserError(f"model {name} reads the tokens ahead that it is to predict; it is no causal one")
            if self.separator is not None:
                rows[:, 3] = self.separator
                self._is_masked = self._way_to_separate(rows, info, name)
            self._has_head_input = self._tells_head_input(rows)
        self.train(was_training)

    def _way_to_separate(self, rows: Tensor, info: StreamInfo, name: str) -> bool:
        """Whether documents need a mask besides their positions.

        Raises:
            UserError: what precedes a document changes it even so.
        """
        alone = self.model(input_ids=rows[:1, 3:], use_cache=False).logits[0]
        said = "it reads across the borders of packed documents, or counts on there, whatever it is told"
        for is_masked in (False, True):
            self._is_masked = is_masked
            try:
                logits = self._read(rows).logits
            except (TypeError, ValueError, RuntimeError) as error:
                said = f"it cannot read packed documents ({first_line(error)[:120]})"
                continue
            if self._near(logits[0, 3:], logits[1, 3:]) and self._near(logits[0, 3:], alone):
                window = getattr(self.model.config.get_text_config(), "sliding_window", None)
                if is_masked and window is not None and window < max(info.input_shape):
                    raise UserError(
                        f"model {name} keeps documents apart by a mask only, which puts its sliding window of {window} "
                        f"tokens out of use, and stream.context is {max(info.input_shape)}; it must be at most "
                        f"{window}, or backbone.is_separated=false"
                    )
                return is_masked
        raise UserError(f"model {name} does not keep documents apart: {said}; backbone.is_separated=false accepts that")

    def _near(self, left: Tensor, right: Tensor) -> bool:
        """Equal up to rounding, however large the numbers are."""
        rounding = 4 * torch.finfo(next(self.model.parameters()).dtype).eps
        return bool((left - right).abs().max() <= max(1e-4, rounding) * right.abs().max())

    def _tells_head_input(self, rows: Tensor) -> bool:
        """Whether the last hidden state that the model gives is what goes into its head."""
        head, seen = self.model.get_output_embeddings(), []
        if head is None:
            return False
        handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        told = self._read(rows).hidden_states
        handle.remove()
        return bool(told and seen) and torch.equal(seen[-1], told[-1])


def separated(tokens_BT: Tensor, separator: int, dtype: torch.dtype, is_masked: bool = True) -> dict[str, Tensor]:
    """What keeps packed documents apart: positions (B, T), and a mask (B, 1, T, T), 0 where a token may look.

    Example:
        >>> found = separated(torch.tensor([[1, 2, 9, 3]]), 9, torch.float32)
        >>> found["position_ids"].tolist(), (found["attention_mask"][0, 0, 3] == 0).tolist()
        ([[0, 1, 0, 1]], [False, False, True, True])
    """
    reset_BT = tokens_BT == separator
    document_BT = reset_BT.long().cumsum(1)
    places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    begin_BT = torch.where(reset_BT, places_T, 0).cummax(1).values
    found = {"position_ids": places_T - begin_BT}
    if not is_masked:
        return found
    visible_BTT = (document_BT.unsqueeze(2) == document_BT.unsqueeze(1)) & (places_T <= places_T.unsqueeze(1))
    mask_BTT = torch.zeros(visible_BTT.shape, dtype=dtype, device=tokens_BT.device)
    mask_BTT.masked_fill_(~visible_BTT, torch.finfo(dtype).min)
    return found | {"attention_mask": mask_BTT.unsqueeze(1)}


def _with_lora(model: Any, lora: dict[str, Any], adapter: str) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    if not isinstance(adapter, str) or not adapter or "." in adapter:
        raise UserError(f"backbone.adapter is {adapter!r}; it must be a name without dots")
    options = lora_options(lora, model)
    try:
        return get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **options), adapter_name=adapter)
    except Exception as error:  # what layers it takes is the library's to say
        raise UserError(f"backbone.lora cannot be put on this model: {first_line(error)}") from None
