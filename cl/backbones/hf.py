"""Any causal language model of transformers: from the hub, from a folder, or drawn anew from a config; full or LoRA.

Documents packed in a row are kept apart by a block-diagonal mask and positions that begin anew. Whether a model heeds
them is tried when it is built, so that a model which cannot (a recurrent one, a linear attention) is not trained across
borders without anybody knowing. Code that a repository brings along is never run.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones._lora import lora_options
from cl.backbones.gpt import TEXT, require_tokens
from cl.core import Batch, Output, StreamInfo, UserError
from cl.hub import hub_address, hub_answers, offline

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

    Raises:
        UserError: a model that cannot be had, whose vocabulary or tokenizer is not the stream's, that reads across
            documents, or a value outside its range.

    Cost: as the model's; weights are float32, computed in the trainer's precision.
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
    ) -> None:
        super().__init__()
        require_tokens(info, "hf")
        if pretrained is not None and config is not None:
            raise UserError("backbone.pretrained and backbone.config are both set; a model comes from one of them")
        self.separator = info.separator if is_separated else None
        if pretrained is None:
            model = _drawn({**TINY} if config is None else dict(config), info)
        else:
            model = _pretrained(pretrained, revision, info, download)
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
        if lora is not None:
            model = _with_lora(model, lora, adapter)
        self.model = model
        self._has_head_input = False
        self._try(info, pretrained or str(model.config.model_type))

    def forward(self, batch: Batch) -> Output:
        """Logits for every token; `hidden` is what the model's head reads, where the model tells."""
        masks = {} if self.separator is None else separated(batch.inputs, self.separator, self._dtype)
        found = self.model(input_ids=batch.inputs, output_hidden_states=True, use_cache=False, **masks)
        hidden_BTD = found.hidden_states[-1] if self._has_head_input else None
        return Output(found.logits, hidden_BTD)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _try(self, info: StreamInfo, name: str) -> None:
        """See on a few tokens whether documents stay apart and which hidden state the head reads."""
        was_training = self.training
        self.eval()
        first, last = [token for token in range(3) if token != info.separator][:2]
        rows = torch.tensor([[first] * 3 + [last] * 3, [last] * 3 + [last] * 3])
        if self.separator is not None:
            rows[:, 3] = self.separator
        with torch.inference_mode():
            masks = {} if self.separator is None else separated(rows, self.separator, self._dtype)
            try:
                found = self.model(input_ids=rows, output_hidden_states=True, use_cache=False, **masks)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"model {name} cannot read packed documents ({str(error).splitlines()[0][:120]}); "
                    "backbone.is_separated=false reads across their borders"
                ) from None
            head = self.model.get_output_embeddings()
            logits = found.logits
            self._has_head_input = head is not None and torch.allclose(
                head(found.hidden_states[-1]).float(), logits.float(), atol=1e-4
            )
            if self.separator is not None and not torch.allclose(logits[0, 3:], logits[1, 3:], atol=1e-4):
                raise UserError(
                    f"model {name} reads across the borders of packed documents, whatever the attention mask says; "
                    "backbone.is_separated=false accepts that"
                )
        self.train(was_training)


def separated(tokens_BT: Tensor, separator: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What keeps packed documents apart: a mask (B, 1, T, T), 0 where a token may look, and positions (B, T).

    Example:
        >>> found = separated(torch.tensor([[1, 2, 9, 3]]), 9, torch.float32)
        >>> found["position_ids"].tolist(), (found["attention_mask"][0, 0, 3] == 0).tolist()
        ([[0, 1, 0, 1]], [False, False, True, True])
    """
    reset_BT = tokens_BT == separator
    document_BT = reset_BT.long().cumsum(1)
    places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    begin_BT = torch.where(reset_BT, places_T, 0).cummax(1).values
    visible_BTT = (document_BT.unsqueeze(2) == document_BT.unsqueeze(1)) & (places_T <= places_T.unsqueeze(1))
    mask_BTT = torch.zeros(visible_BTT.shape, dtype=dtype, device=tokens_BT.device)
    mask_BTT.masked_fill_(~visible_BTT, torch.finfo(dtype).min)
    return {"attention_mask": mask_BTT.unsqueeze(1), "position_ids": places_T - begin_BT}


def _drawn(values: dict[str, Any], info: StreamInfo) -> Any:
    """A model with weights drawn from torch's generator."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if "model_type" not in values:
        raise UserError("backbone.config has no model_type; it needs one, such as llama, gpt2 or mamba")
    special = {"bos_token_id": info.separator, "eos_token_id": info.separator, "pad_token_id": None}
    length = {"max_position_embeddings": max(64, *info.input_shape)}
    try:
        kind = values.pop("model_type")
        config = AutoConfig.for_model(kind, **{**special, **length, **values, "vocab_size": info.num_outputs})
        return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"backbone.config makes no causal language model: {str(error).splitlines()[0][:160]}") from None


def _pretrained(name: str, revision: str | None, info: StreamInfo, download: bool) -> Any:
    """A model with its weights, from a folder, the hub's cache on this machine, or the network when asked for."""
    from transformers import AutoModelForCausalLM

    way = "give the folder of a model as backbone.pretrained"
    is_folder = Path(name).expanduser().is_dir()
    options = {"revision": revision, "dtype": torch.float32, "trust_remote_code": False}
    where = str(Path(name).expanduser()) if is_folder else name
    try:
        with offline():
            model = AutoModelForCausalLM.from_pretrained(where, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        if is_folder:
            raise UserError(f"backbone.pretrained is {name!r}, which cannot be read: {_first_line(error)}") from None
        if not download:
            raise UserError(
                f"backbone.pretrained is {name!r}: no folder here, and not in the hub's cache; {way}, or let it be "
                "fetched with data.download=true"
            ) from None
        if not hub_answers():
            raise UserError(f"model {name} cannot be fetched: {hub_address()} does not answer; {way}") from None
        try:
            model = AutoModelForCausalLM.from_pretrained(name, **options)
        except (OSError, ValueError, KeyError) as failure:
            raise UserError(f"model {name} cannot be fetched: {_first_line(failure)}; {way}") from None
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < info.num_outputs:
        raise UserError(
            f"model {name} has {rows} tokens and the stream's tokenizer {info.num_outputs}; set "
            f"stream.tokenizer={name}, the model's own"
        )
    _require_own_tokenizer(name, where, info)
    if rows > info.num_outputs:
        # embeddings are often padded to a round number; those tokens never occur
        model.resize_token_embeddings(info.num_outputs)
    return model


def _require_own_tokenizer(name: str, where: str, info: StreamInfo) -> None:
    """A pretrained model reads the tokens that it was trained with; silent where its tokenizer is not at hand."""
    file = Path(where) / "tokenizer.json"
    if not file.is_file():
        try:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(name, "tokenizer.json", local_files_only=True))
        except Exception:
            warnings.warn(
                f"model {name} brings no tokenizer.json: whether it fits the stream is not known", stacklevel=2
            )
            return
    digest = hashlib.sha256(f"{info.separator}\n{file.read_text()}".encode()).hexdigest()[:16]
    if digest != info.tokenizer:
        raise UserError(
            f"model {name} was trained with another tokenizer than that of stream {info.name} "
            f"({info.tokenizer or 'unknown'}); set stream.tokenizer={name}, the model's own"
        )


def _with_lora(model: Any, lora: dict[str, Any], adapter: str) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(task_type=TaskType.CAUSAL_LM, **lora_options(lora))
    try:
        return get_peft_model(model, config, adapter_name=adapter)
    except ValueError as error:
        raise UserError(f"backbone.lora cannot be put on this model: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
