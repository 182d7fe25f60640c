"""Chat templates as plain data, and conversations turned into documents with prompt spans.

A template says what stands before and after the words of each role. Its literals of special tokens become ids of their
own; the words of a conversation never do, whatever they contain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data.chunk_index import PROMPT
from data.document import Segment
from data.errors import InputError

ANSWER_ROLE = "assistant"
_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")


class Unusable(Exception):
    """A record that gives no document, with the reason under which it is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written.

    Text is `begin`, then for every message prefix + content + suffix of its role, with `separator` between messages.
    `trim` strips white space around contents. `special_tokens` get ids of their own, added to the vocabulary if missing.
    """

    roles: Mapping[str, tuple[str, str]]
    begin: str = ""
    separator: str = ""
    trim: bool = False
    special_tokens: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The template as JSON keeps it: what `load_template` reads."""
        roles = {role: {"prefix": prefix, "suffix": suffix} for role, (prefix, suffix) in self.roles.items()}
        return asdict(self) | {"roles": roles, "special_tokens": list(self.special_tokens)}


_ROLES = ("system", "user", ANSWER_ROLE)
TEMPLATES = {
    # LLaDA-8B-Instruct's chat template, https://huggingface.co/GSAI-ML/LLaDA-8B-Instruct, tokenizer_config.json
    "llada": ChatTemplate(
        roles={role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>") for role in _ROLES},
        begin="<|startoftext|>",
        trim=True,
        special_tokens=("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # OpenAI's ChatML; the line end after <|im_end|> belongs to what follows, so an answer ends with its marker
    "chatml": ChatTemplate(
        roles={role: (f"<|im_start|>{role}\n", "<|im_end|>") for role in _ROLES},
        separator="\n",
        special_tokens=("<|im_start|>", "<|im_end|>"),
    ),
}


def load_template(name: str) -> ChatTemplate:
    """A built-in template by name, or one from a JSON file.

    The file: {"begin": ..., "separator": ..., "trim": ..., "roles": {ROLE: {"prefix": ..., "suffix": ...}},
    "special_tokens": [...]}; only roles is needed and must hold `assistant`. Without special_tokens, literals of the form
    <|...|> in the template are taken. Raises InputError for anything else.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise InputError(
            f"chat: {name!r} is neither a template ({', '.join(TEMPLATES)}) nor a file; name one of them or a JSON file"
        )

    def refuse(what: str) -> InputError:
        return InputError(f"chat: {path}: {what}; docs/data-prepare.md shows a template file")

    try:
        record = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(f"not a readable JSON file ({str(error):.80})") from error
    allowed = {"begin": str, "separator": str, "trim": bool, "roles": dict, "special_tokens": list}
    if not isinstance(record, dict) or not isinstance(record.get("roles"), dict):
        raise refuse("needs an object with `roles`")
    for key, value in record.items():
        if not isinstance(value, allowed.get(key, ())):
            wanted = (
                f"must be a {allowed[key].__name__}"
                if key in allowed
                else f"is unknown (allowed: {', '.join(allowed)})"
            )
            raise refuse(f"{key} {wanted}")
    roles = {}
    for role, parts in record["roles"].items():
        keys = parts.keys() if isinstance(parts, dict) else None
        if keys is None or not keys <= {"prefix", "suffix"} or not all(isinstance(p, str) for p in parts.values()):
            raise refuse(f"roles.{role} must be an object with the strings prefix and suffix")
        roles[role] = (parts.get("prefix", ""), parts.get("suffix", ""))
    if ANSWER_ROLE not in roles:
        raise refuse(f"roles lacks {ANSWER_ROLE}, whose words are learned")
    special = record.get("special_tokens")
    if special is None:
        texts = [
            record.get("begin", ""),
            record.get("separator", ""),
            *(text for pair in roles.values() for text in pair),
        ]
        special = list(dict.fromkeys(literal for text in texts for literal in _SPECIAL.findall(text)))
    if not all(isinstance(literal, str) and literal for literal in special):
        raise refuse("special_tokens must be a list of strings that are not empty")
    return ChatTemplate(
        roles, record.get("begin", ""), record.get("separator", ""), record.get("trim", False), tuple(special)
    )


def conversation_documents(
    messages: Any, template: ChatTemplate, turns: Literal["each", "all"]
) -> list[tuple[Segment, ...]]:
    """Segments of the documents that a conversation gives: prompts, and answers with their suffix, which carry the loss.

    `each`: one document for every answer, with all earlier turns as its prompt (LLaDA's SFT). `all`: one document with loss
    on every answer. Messages after the last answer are left out: nothing in them is learned. Raises Unusable.
    """
    pieces: list[Segment] = [Segment(template.begin, PROMPT, template=True)]
    answers: list[int] = []  # for every answer, the number of segments up to its end
    for number, (role, content) in enumerate(_messages(messages, template)):
        prefix, suffix = template.roles[role]
        kind = None if role == ANSWER_ROLE else PROMPT
        pieces.append(Segment((template.separator if number else "") + prefix, PROMPT, template=True))
        pieces += [Segment(content, kind), Segment(suffix, kind, template=True)]
        if role == ANSWER_ROLE:
            answers.append(len(pieces))
    if not answers:
        raise Unusable("no_assistant_turn")
    if turns == "all":
        return [tuple(pieces[: answers[-1]])]
    return [
        tuple(piece if at >= end - 2 else piece._replace(kind=PROMPT) for at, piece in enumerate(pieces[:end]))
        for end in answers
    ]


def _messages(messages: Any, template: ChatTemplate) -> list[tuple[str, str]]:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise Unusable("no_messages", "a list of objects with role and content is wanted")
    checked = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in template.roles:
            raise Unusable("unknown_role", f"{role!r:.40}, the template has {', '.join(template.roles)}")
        if not isinstance(content, str):
            raise Unusable("content_not_text", f"of {role}: {type(content).__name__}")
        content = content.strip() if template.trim else content
        if not content:
            raise Unusable("empty_message", f"of {role}")
        checked.append((role, content))
    return checked
