"""Load a causal language model from a folder, and reject it if its weights do not fit its config.

transformers fills a missing weight with random values and leaves out an unknown one. It only reports this in
a table that scrolls by.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from rpt_lightning.compat.transformers import ignored_names
from rpt_lightning.pretrained.tokenizer import first_line

WAY_OUT = "copy or download the model again, or correct its config.json"


def load_causal_lm(
    path: str, *, where: str, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the model of a folder or hub id, with all of its weights and no others.

    ``where`` begins every message: the flag and its value. Raises ValueError that names the weights if one is
    missing, unknown, of another shape or not finite. Also raises ValueError if a tied head differs from its
    embedding, or if the folder cannot be read.
    """
    # The table would take a hundred lines for what the error says in one.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model, found = cast(Any, AutoModelForCausalLM).from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        if not (isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError"):
            raise
        raise ValueError(f"{where}: its weights cannot be loaded ({first_line(error)}); {WAY_OUT}") from error
    finally:
        logging.set_verbosity(verbosity)
    check_names(
        missing=found["missing_keys"],
        # If weights are missing, every unknown name helps: they may be there under other names.
        unknown=found["unexpected_keys"]
        if found["missing_keys"]
        else own_names(model, found["unexpected_keys"]),
        misshapen={name: (tuple(there), tuple(wanted)) for name, there, wanted in found["mismatched_keys"]},
        where=where,
    )
    check_tied(model, where=where)
    if bad := not_finite(model.named_parameters()):
        raise ValueError(not_finite_message(bad, where=where))
    return cast(PreTrainedModel, model)


def check_names(
    *,
    missing: Collection[str],
    unknown: Collection[str],
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    where: str,
) -> None:
    """Raise ValueError if the weights are not those of the config.

    ``misshapen`` holds the shape in the file and the shape that the config asks for.
    """
    faults = []
    if missing:
        faults.append(f"lack {some(missing)}")
    if unknown:
        faults.append(f"hold {some(unknown)}, which the config's model does not have")
    if misshapen:
        name, (there, wanted) = min(misshapen.items())
        faults.append(
            f"have other shapes than the config's model: {some(misshapen)} "
            f"({name}: {list(there)} instead of {list(wanted)})"
        )
    if faults:
        raise ValueError(
            f"{where}: its weights do not fit its config.json: they {'; they '.join(faults)}. "
            f"Without them it would be a different model: {WAY_OUT}"
        )


def own_names(model: PreTrainedModel, unknown: Iterable[str]) -> list[str]:
    """Select the unknown names that would belong to the model: to its layers, its embeddings or its head.

    A file may hold other weights as well (a value head, another modality). They are not part of the model,
    which is complete without them.
    """
    output: Any = cast(Any, model).get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), None)
    roots = tuple(f"{root}." for root in (model.base_model_prefix, head) if root)
    return sorted(name for name in unknown if name.startswith(roots) and not is_ignored(model, name))


def is_ignored(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers itself allows this name in a file.

    Examples are buffers that older versions saved, and layers of a second head.
    """
    return any(re.search(pattern, name) for pattern in ignored_names(model))


def check_tied(model: PreTrainedModel, *, where: str) -> None:
    """Raise ValueError if the config ties the head to the embedding but the files hold two different ones.

    transformers keeps such a pair apart.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: Any = model.get_input_embeddings()
    if (
        model.config.get_text_config().tie_word_embeddings
        and head is not None
        and head.weight is not embedding.weight
    ):
        raise ValueError(tied_message(where=where))


def tied_message(*, where: str) -> str:
    """Return the message for a head and an embedding that the config ties but that differ."""
    return (
        f"{where}: its config.json ties the output head to the embedding (tie_word_embeddings), "
        "and its weights hold two that differ: an engine would compute with one, the policy with both. "
        "Set tie_word_embeddings to false in its config.json, or copy the model again"
    )


def not_finite_message(names: Collection[str], *, where: str) -> str:
    """Return the message for weights with a NaN or an infinity."""
    return f"{where}: {some(names)} of its weights hold NaN or infinity; {WAY_OUT}"


def not_finite(weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the weights with a NaN or an infinity."""
    return [name for name, tensor in weights if tensor.is_floating_point() and not is_finite(tensor)]


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite. It checks in parts: a mask of a whole embedding takes a gigabyte."""
    return all(bool(part.isfinite().all()) for part in torch.split(tensor.detach().flatten(), 2**24))


def some(names: Collection[str]) -> str:
    """Return the number of names, and the first of them.

    >>> some({"b", "a", "c", "d"})
    '4 (a, b, c, ...)'
    """
    first = sorted(names)[:3]
    return f"{len(names)} ({', '.join(first)}{', ...' if len(names) > len(first) else ''})"
