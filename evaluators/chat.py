"""Conversations of instruct models: parsed from rows of data, rendered with the tokenizer's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoeff.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHAT_COLUMNS", "Conversation", "conversation", "rendered"]

Conversation = tuple[tuple[str, str], ...]
"""(role, content) of each message."""

CHAT_COLUMNS = ("messages", "conversations")
_FIELDS = (("role", "content"), ("from", "value"))
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # as rows of {from, value} call them


def conversation(value: Any, where: str) -> Conversation:
    """The messages of one row: a list of `{role, content}`, or of `{from, value}` with the speakers human, gpt and system.

    Raises:
        InputError: Another form; the message begins with `where`.
    """
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{where} is no conversation: expected a list of {{role, content}}, found {type(value).__name__}")
    messages = []
    for number, message in enumerate(value, start=1):
        fields = message if isinstance(message, dict) else {}
        role, content = next(((fields[a], fields[b]) for a, b in _FIELDS if a in fields and b in fields), (None, None))
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"{where}, message {number} has no string under role and content")
        messages.append((role if "role" in fields else _SPEAKERS.get(role, role), content))
    return tuple(messages)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Conversation, where: str) -> list[int]:
    """The ids of a conversation as the tokenizer's chat template (Jinja, in the sandbox of transformers) writes it.

    Raises:
        InputError: The tokenizer has no template, or its template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{where} holds conversations, and the tokenizer has no chat template; give plain text, or an instruct model")
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages], tokenize=True, return_dict=False
        )
    except Exception as error:  # whatever a template raises: of Jinja, of the sandbox, or of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"{where}: the chat template does not take the conversation that begins {messages[0][1][:40]!r}: {reason}"
        ) from None
    return ids
