r"""The wordings of the question, in the sense of the paper's Table 10 (RPT, appendix). The words are our own.

All main runs use ``v0``. ``v1`` asks for a final prediction and fences the context. ``v2`` is ``v1`` after a
preamble. ``v3`` asks for several candidates first. ``v4`` gives three worked examples. ``v5`` is ``v0`` with
a fenced context. ``v6`` has the idea of ``v3``, with the instruction repeated after the context.
"""

from __future__ import annotations

CONTEXT_SLOT = "@@RPT-CONTEXT@@"
NOTE_SLOT = "@@RPT-NOTE@@"
_CONTEXT_HEADING = "### Context"

_FENCED = f"### Context\n```\n{CONTEXT_SLOT}\n```"

_V0 = (
    r"""Complete the text under "### Context" by predicting the token that comes next, """
    r"""and put that token in \boxed{}.
Reason step by step towards the most probable next token before you answer.
The next token may begin with a space, as in \boxed{ para} or \boxed{ =}, and the space counts. """
    r"""Do not use \text{} inside the box.
"""
)

_V1 = (
    r"""The text under "### Context" breaks off.
Think step by step about how it goes on, then give your final prediction of the next token in \boxed{}.
Keep a leading space where the token has one, as in \boxed{ para} or \boxed{ =}, """
    r"""and do not use \text{} inside the box.
"""
)

_V3 = (
    r"""The text under "### Context" breaks off.
List several candidates for the next token, weigh them against each other, """
    r"""and choose the most probable one. Give it in \boxed{}.
Keep a leading space where the token has one, as in \boxed{ para} or \boxed{ =}, """
    r"""and do not use \text{} inside the box.
"""
)

_V4_EXAMPLES = (
    r"""
### Example 1
Context: "To prove the lemma we first note that"
The sentence needs the thing that is noted; a reference to the case at hand is most likely. """
    r"""Prediction: \boxed{ this}

### Example 2
Context: "The square of 7 is 4"
7 * 7 = 49, and the 4 is already there. Prediction: \boxed{9}

### Example 3
Context: "The solutions are listed below"
A list follows on the next line, so a colon and a line break come next. Prediction: \boxed{:
}

"""
)

_REMINDER = (
    r"Now list several candidates for the token that comes directly after the context, "
    r"choose the most probable one, and give it in \boxed{}."
)

WORDINGS: dict[str, str] = {
    "v0": f"{_V0}\n### Context\n{CONTEXT_SLOT}",
    "v1": f"{_V1}\n{_FENCED}",
    "v2": "You are a helpful assistant who is good at predicting the next token of a text.\n"
    f"{_V1}\n{_FENCED}",
    "v3": f"{_V3}\n{_FENCED}",
    "v4": f"{_V1}{_V4_EXAMPLES}{_FENCED}",
    "v5": f"{_V0}\n{_FENCED}",
    "v6": f"{_V3}\n{_FENCED}\n\n{_REMINDER}",
}


def with_note(wording: str) -> str:
    r"""Return a wording with `NOTE_SLOT` as a paragraph of its own before the context's heading.

    >>> with_note(f"Predict.\n\n### Context\n{CONTEXT_SLOT}")
    'Predict.\n\n@@RPT-NOTE@@\n\n### Context\n@@RPT-CONTEXT@@'
    """
    before, heading, after = wording.rpartition(_CONTEXT_HEADING)
    return f"{before}{NOTE_SLOT}\n\n{heading}{after}"
