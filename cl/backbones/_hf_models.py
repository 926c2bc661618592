"""Where `backbone=hf` gets a model from: drawn for a config, or read with all its weights, and no code run."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from cl.core import StreamInfo, UserError
from cl.hub import hub_address, hub_answers, offline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ATTENTION = ("sdpa", "eager", "flex_attention")
"""What a config may ask for; other names are those of kernels to fetch."""


def drawn(values: dict[str, Any], info: StreamInfo, dtype: torch.dtype) -> Any:
    """A model with weights drawn from torch's generator."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if "model_type" not in values:
        raise UserError("backbone.config has no model_type; it needs one, such as llama, gpt2 or mamba")
    special = {"bos_token_id": info.separator, "eos_token_id": info.separator, "pad_token_id": None}
    kind, length = values.pop("model_type"), "max_position_embeddings"
    try:
        own = AutoConfig.for_model(kind).attribute_map.get(length, length)
        if not {length, own} & values.keys():
            values[length] = max(64, *info.input_shape)
        config = AutoConfig.for_model(kind, **{**special, **values, "vocab_size": info.num_outputs})
        _require_plain(config, "backbone.config")
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # a config can fail in any way
        raise UserError(f"backbone.config makes no causal language model: {first_line(error)}") from None


def loaded(name: str, revision: str | None, info: StreamInfo, dtype: torch.dtype, download: bool) -> Any:
    """A model with its weights, from a folder, the hub's cache on this machine, or the network when asked for."""
    way = "give the folder of a model as backbone.pretrained"
    is_folder = Path(name).expanduser().is_dir()
    where = str(Path(name).expanduser()) if is_folder else name
    try:
        with offline():
            model = _read(where, name, dtype, revision=revision, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # damaged files, and packages that are missing, fail in any way
        if is_folder or not isinstance(error, OSError | ValueError | KeyError):
            # torch advises to load a pickle of other things all the same
            is_code = isinstance(error, UnpicklingError)
            why = "its pickle is damaged or holds more than tensors; give safetensors" if is_code else first_line(error)
            raise UserError(f"backbone.pretrained is {name!r}, which cannot be read: {why}") from None
        if not download:
            raise UserError(
                f"backbone.pretrained is {name!r}: no folder here, and not in the hub's cache; {way}, or let it be "
                "fetched with data.download=true"
            ) from None
        if not hub_answers():
            raise UserError(f"model {name} cannot be fetched: {hub_address()} does not answer; {way}") from None
        try:
            model = _read(name, name, dtype, revision=revision)
        except UserError:
            raise
        except Exception as failure:
            raise UserError(f"model {name} cannot be fetched: {first_line(failure)}; {way}") from None
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < info.num_outputs and info.separator != rows:
        raise UserError(
            f"model {name} has {rows} tokens and the stream's tokenizer {info.num_outputs}; set "
            f"stream.tokenizer={name}, the model's own"
        )
    _require_own_tokenizer(name, where, info)
    if rows < info.num_outputs:
        raise UserError(
            f"model {name} has {rows} tokens, and no other for what separates documents: its tokenizer names no end of "
            "a text; set eos_token in the tokenizer_config.json beside it"
        )
    if rows > info.num_outputs:
        # embeddings are often padded to a round number; those tokens never occur
        model.resize_token_embeddings(info.num_outputs)
    return model


def _read(where: str, name: str, dtype: torch.dtype, **options: Any) -> Any:
    """The model with all its weights, none of them drawn anew without anybody knowing."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import find_adapter_config_file, logging

    if find_adapter_config_file(where, **options) is not None:
        raise UserError(
            f"model {name} is an adapter of peft; merge it into its model (merge_and_unload, save_pretrained) and give "
            "the folder of that"
        )
    config = AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    _require_plain(config, f"model {name}")
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # what it reports of the weights is said below
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    finally:
        logging.set_verbosity(told)
    absent = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if absent:
        raise UserError(
            f"model {name} has no weights, or some of another shape, for {_some(absent)}; they would be drawn at random"
        )
    if found["unexpected_keys"]:
        warnings.warn(
            f"model {name} has no place for some weights that are stored with it: {_some(found['unexpected_keys'])}",
            stacklevel=2,
        )
    return model


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


def _require_plain(config: Any, what: str) -> None:
    """A config may name kernels on the hub, which are code, or a form of weights that is not trained."""
    for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = getattr(each, "_attn_implementation", None)
        if attention not in (None, *ATTENTION):
            raise UserError(f"{what} has attn_implementation={attention!r}; it must be one of {', '.join(ATTENTION)}")
        if getattr(each, "quantization_config", None) is not None:
            raise UserError(f"{what} is quantised (quantization_config), and only plain weights are trained")


def require_positions(config: Any, name: str, info: StreamInfo) -> None:
    """No row may be longer than what the model has positions for."""
    for key in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(config.get_text_config(), key, None)
        if isinstance(limit, int) and 0 < limit < max(info.input_shape):
            raise UserError(
                f"model {name} reads at most {limit} tokens ({key} of its config), and stream.context is "
                f"{max(info.input_shape)}; it must be at most as many"
            )


def _require_own_tokenizer(name: str, where: str, info: StreamInfo) -> None:
    """A pretrained model reads the tokens that it was trained with; silent where its tokenizer is not at hand."""
    file = Path(where) / "tokenizer.json"
    if not file.is_file():
        try:
            from huggingface_hub import hf_hub_download

            with offline():
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


def first_line(error: BaseException) -> str:
    """What went wrong; of errors that announce themselves in a line of their own, what they announce."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if not line.endswith(":")), type(error).__name__)
    return told[:200]
