"""The format in which a task folder stores a document (docs/architecture.md).

Every value is an array of a type listed here. litdata chooses a serializer by what a value looks like. For
example, it pickles text that happens to be the path of an existing file. Text is therefore converted to UTF-8
bytes before litdata sees it, so that litdata has nothing to guess.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

Item = dict[str, Any]

TEXT_TYPE = (np.uint8, 1)  # UTF-8
# Type and number of dimensions. [L] are the document's tokens, [P] its stored positions, and [P, 16] the
# candidates at each of them.
ITEM_TYPES: dict[str, tuple[type, int]] = {
    "doc_id": TEXT_TYPE,
    "token_ids": (np.int32, 1),
    "positions": (np.int32, 1),
    "entropy": (np.float32, 1),
    "true_prob": (np.float32, 1),
    "true_rank": (np.int32, 1),
    "answerable": (np.uint8, 1),
    "candidate_ids": (np.int32, 2),
    "candidate_probs": (np.float32, 2),
}
# Present in folders whose source knows fields. JSON text: a list with one object per stored position, or null
# if the document has none.
FIELDS = "fields"
# Present in folders of an objective that stores a text with each task. JSON text: a list of texts, one for
# each stored position.
MATERIAL = "material"


def encode_item(item: Item) -> dict[str, NDArray[Any]]:
    """Convert an item to its stored form.

    Raises ValueError if its id is not text or a value has a wrong type.
    """
    stored = dict(item) | {
        "doc_id": text_array(item["doc_id"], what=f"the id of document {item['doc_id']!r}")
    }
    types = dict(ITEM_TYPES)
    if FIELDS in item:
        types[FIELDS] = TEXT_TYPE
        stored[FIELDS] = text_array(json.dumps(item[FIELDS], sort_keys=True, allow_nan=False), what=FIELDS)
    if MATERIAL in item:
        types[MATERIAL] = TEXT_TYPE
        stored[MATERIAL] = text_array(json.dumps(item[MATERIAL]), what=MATERIAL)
    if stored.keys() != types.keys():
        raise ValueError(f"an item of a task folder holds {', '.join(types)}, and not {', '.join(stored)}")
    for name, (dtype, ndim) in types.items():
        value = stored[name]
        if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != ndim:
            found = (
                f"{value.dtype} [{value.ndim} dimensions]"
                if isinstance(value, np.ndarray)
                else type(value).__name__
            )
            raise ValueError(
                f"document {item['doc_id']!r}: {name} is {found}, "
                f"but must be an array of {dtype.__name__} [{ndim} dimensions]"
            )
    return {name: stored[name] for name in types}


def decode_item(stored: dict[str, Any]) -> Item:
    """Convert a stored item back. Folders of format 1 hold the id as text.

    Raises ValueError if the stored fields do not match the positions.
    """
    doc_id = stored["doc_id"]
    item = stored | {"doc_id": doc_id if isinstance(doc_id, str) else array_text(doc_id)}
    if FIELDS in stored:
        item[FIELDS] = rows = json.loads(array_text(stored[FIELDS]))
        if rows is not None and (
            not isinstance(rows, list)
            or len(rows) != len(stored["positions"])
            or not all(isinstance(row, dict) for row in rows)
        ):
            raise ValueError(
                f"document {item['doc_id']!r}: its stored fields are not one object per position; "
                "make the task folder again with `rpt prepare`"
            )
    if MATERIAL in stored:
        item[MATERIAL] = texts = json.loads(array_text(stored[MATERIAL]))
        if (
            not isinstance(texts, list)
            or len(texts) != len(stored["positions"])
            or not all(isinstance(text, str) for text in texts)
        ):
            raise ValueError(
                f"document {item['doc_id']!r}: what its objective stored is not one text per position; "
                "make the task folder again with `rpt prepare`"
            )
    return item


def item_digest(item: Item) -> bytes:
    """Compute the SHA-256 of everything that is stored of an item, including names, types and shapes."""
    digest = hashlib.sha256()
    for name, values in encode_item(item).items():
        digest.update(f"{name} {values.dtype.str} {values.shape} ".encode() + values.tobytes())
    return digest.digest()


def text_array(text: Any, *, what: str) -> NDArray[np.uint8]:
    """Encode text as UTF-8 bytes.

    Raises ValueError that begins with ``what`` if the value is not text or has no UTF-8 encoding, such as a
    file name in another encoding.
    """
    if not isinstance(text, str):
        raise ValueError(f"{what} is a {type(text).__name__}, but must be text")
    try:
        return np.frombuffer(text.encode(), dtype=np.uint8)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is not Unicode at character {error.start}; "
            "a file whose name is in another encoding must be renamed"
        ) from error


def array_text(array: NDArray[np.uint8]) -> str:
    """Decode UTF-8 bytes to text."""
    return array.tobytes().decode()
