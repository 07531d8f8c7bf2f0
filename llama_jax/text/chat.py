"""Conversations -> the ids a chat model was tuned on, one function per format, plus the tokenizer's own Jinja template.

Formats: "llama2" (Llama 2 chat), "codellama" (Code Llama Instruct 7B to 34B), "codellama_70b", "llama3" (3 to 3.3), "template"
(the Jinja template beside the tokenizer), and "" for a base model, which cannot chat. The parts of a prompt are encoded as
Meta encodes them, one by one; control tokens are put in by id. Content is stripped, as Llama 2, Code Llama and Llama 3 do
(llama-models, which came with 3.1, keeps the space around it).
"""

import datetime
import re
from collections.abc import Mapping, Sequence

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.base import Tokenizer
from llama_jax.text.templates import (
    CHAT_TEMPLATES,
    CODELLAMA_TAGS,
    LLAMA2_TAGS,
    ROLE_ERROR,
    TAG_ERROR,
    escape_content,
    render,
    unused_character,
)

__all__ = ["CHAT_TEMPLATES", "FORMATS", "chat_format_of", "encode_chat", "stop_ids"]

FORMATS = ("llama2", "codellama", "codellama_70b", "llama3", "template")
ROLES = ("system", "user", "assistant", "tool", "ipython", "developer", "function")

Messages = Sequence[Mapping[str, str]]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    chat_format: str,
    template: str | None = None,
    *,
    now: datetime.datetime | None = None,
) -> list[int]:
    """Ids of a conversation, open for the assistant's answer.

    Args:
        messages: {"role": ..., "content": ...} in order; the last is not the assistant's.
        chat_format: one of FORMATS.
        template: for "template": Jinja source; without it the tokenizer's own.
        now: the date a template may write into the prompt; the clock's if not given.

    Raises:
        LlamaError: BAD_REQUEST for roles out of order, for Llama 2's tags inside content (Meta answers such a conversation
            with a fixed error text instead; we refuse it), and for what the template itself refuses.
    """
    _check(messages)
    if chat_format == "template":
        return _encode_template(tokenizer, messages, template or tokenizer.chat_template, now or datetime.datetime.now())
    if chat_format in ("llama2", "codellama"):
        return _encode_llama2(tokenizer, messages, CODELLAMA_TAGS if chat_format == "codellama" else LLAMA2_TAGS)
    if chat_format == "codellama_70b":
        return _encode_codellama_70b(tokenizer, messages)
    if chat_format == "llama3":
        return _encode_llama3(tokenizer, messages)
    known = ", ".join(FORMATS)
    if not chat_format:
        raise _refused(f"this is a base model, it knows no conversations: use a chat model, or name a chat format ({known})")
    raise _refused(f"unknown chat format {chat_format!r}; known: {known}")


def stop_ids(tokenizer: Tokenizer, chat_format: str) -> tuple[int, ...]:
    """The ids that end an answer in this format."""
    names = {"codellama_70b": ("<step>",), "llama3": ("<|eot_id|>", "<|eom_id|>")}.get(chat_format, ())
    found = (tokenizer.token_id(name) for name in names)
    return tuple(dict.fromkeys([*(i for i in found if i is not None), *tokenizer.stop_ids]))


def chat_format_of(name: str, template: str | None, tokenizer: Tokenizer | None) -> str:
    """The chat format of a released or fine-tuned model, "" for a base model.

    Args:
        name: the source folder's name, such as "llama-2-7b-chat" or "Meta-Llama-3-8B-Instruct".
        template: its Jinja template, if it has one; one that does not look like the named family's wins over the name.
        tokenizer: if known, it must hold the control tokens of the format.
    """
    found = _named_format(re.sub(r"[\s_-]+", "", name.lower()))
    marks = {"llama2": "[INST]", "codellama": "[INST]", "codellama_70b": "Source: ", "llama3": "<|start_header_id|>"}
    needed = {"llama3": "<|start_header_id|>", "codellama_70b": "<step>"}
    if found and template and marks[found] not in template:
        found = ""
    if found in needed and tokenizer is not None and tokenizer.token_id(needed[found]) is None:
        found = ""
    return found or ("template" if template else "")


def _named_format(name: str) -> str:
    if "codellama" in name:
        return ("codellama_70b" if "70b" in name else "codellama") if "instruct" in name else ""
    if "llama2" in name and "chat" in name:
        return "llama2"
    return "llama3" if "llama3" in name and "instruct" in name else ""


def _encode_llama2(tokenizer: Tokenizer, messages: Messages, tags: Sequence[str]) -> list[int]:
    """BOS [INST] user [/INST] assistant EOS for each turn; the system message goes into the first user's."""
    _refuse_tags(messages, tags)
    texts = [m["content"] for m in messages]
    roles = [m["role"] for m in messages]
    if roles[0] == "system":
        roles = roles[1:]
        texts = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}", *texts[2:]] if roles else []
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise _refused(ROLE_ERROR)
    if len(roles) % 2 == 0:
        raise _refused(f"Last message must be from user, got {messages[-1]['role']}")
    ids: list[int] = []
    for user, assistant in zip(texts[0:-1:2], texts[1::2], strict=True):
        ids += tokenizer.encode(f"[INST] {user.strip()} [/INST] {assistant.strip()} ", bos=True, eos=True)
    return ids + tokenizer.encode(f"[INST] {texts[-1].strip()} [/INST]", bos=True)


def _encode_codellama_70b(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """BOS, then ` Source: role`, the content and <step> for each message; each piece is encoded by itself."""
    step = _control(tokenizer, "<step>", "codellama_70b")
    _refuse_tags(messages, ("<step>",))
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    for i, message in enumerate(messages):
        if message["role"] != ("system" if i == 0 else ("user", "assistant")[(i - 1) % 2]):
            raise _refused(ROLE_ERROR)
    if messages[-1]["role"] != "user":
        raise _refused(f"Last message must be from user, got {messages[-1]['role']}")
    ids = tokenizer.encode("", bos=True)
    for message in messages:
        destination = f"\nDestination: {message['destination']}" if message.get("destination") else ""
        ids += tokenizer.encode(f" Source: {message['role']}{destination}")
        if message["content"]:
            ids += tokenizer.encode(f"\n\n {message['content'].strip()}")
        ids.append(step)
    return ids + tokenizer.encode(" Source: assistant\nDestination: user") + tokenizer.encode("\n\n ")


def _encode_llama3(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """BOS once, then header, blank line, content and <|eot_id|> for each message."""
    start, end, turn = (_control(tokenizer, f"<|{n}|>", "llama3") for n in ("start_header_id", "end_header_id", "eot_id"))
    if messages[-1]["role"] == "assistant":
        raise _refused("the last message is the assistant's: there is nothing to answer")
    break_ids = tokenizer.encode("\n\n")

    def header(role: str) -> list[int]:
        if role not in ("system", "user", "assistant", "ipython", "tool"):
            raise _refused(f"role {role!r} is not one of Llama 3's: system, user, assistant, ipython (or tool)")
        return [start, *tokenizer.encode("ipython" if role == "tool" else role), end, *break_ids]

    ids = tokenizer.encode("", bos=True)
    for message in messages:
        ids += [*header(message["role"]), *tokenizer.encode(message["content"].strip()), turn]
    return ids + header("assistant")


def _encode_template(tokenizer: Tokenizer, messages: Messages, template: str | None, now: datetime.datetime) -> list[int]:
    """The rendered template's ids; whatever it does with content (strip, join, split it), content gives no control token.

    Every possible beginning of a control token is escaped, unless the template looks at content and then renders otherwise,
    but with the same control tokens.
    """
    if not template:
        raise _refused("the tokenizer has no chat template: give one, or name a chat format")
    texts = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
    tokens = {"bos_token": texts.get(tokenizer.bos_id, ""), "eos_token": texts.get(tokenizer.eos_id, "")}
    escape = unused_character([template, *tokenizer.special_tokens, *_strings(messages)])
    specials = tokenizer.special_tokens
    plain, strict = (
        render(template, escape_content(messages, specials, escape, everywhere=everywhere), tokens, now)
        for everywhere in (False, True)
    )
    control = tokenizer.special_pattern(escape)
    looks_at_content = plain.replace(escape, "") != strict.replace(escape, "")
    prompt = plain if looks_at_content and control.findall(plain) == control.findall(strict) else strict
    ids = tokenizer.encode_template(prompt, escape)
    return ids[1:] if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2 else ids


def _check(messages: Messages) -> None:
    if not messages:
        raise _refused("a conversation needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise _refused(f"message {i} needs a role and a content")
        if not isinstance(message["content"], str):
            raise _refused(f"the content of message {i} must be a string, not {type(message['content']).__name__}")
        if message["role"] not in ROLES:
            raise _refused(f"message {i} has role {message['role']!r}, known: {', '.join(ROLES)}")


def _refuse_tags(messages: Messages, tags: Sequence[str]) -> None:
    for i, message in enumerate(messages):
        found = next((tag for tag in tags if tag in message["content"]), None)
        if found:
            raise _refused(f"message {i} contains {found}: {TAG_ERROR}")


def _control(tokenizer: Tokenizer, name: str, chat_format: str) -> int:
    token_id = tokenizer.token_id(name)
    if token_id is None:
        raise LlamaError(ExitCode.BAD_TOKENIZER, f"chat format {chat_format} needs {name}, which this tokenizer does not have")
    return token_id


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []


def _refused(message: str) -> LlamaError:
    return LlamaError(ExitCode.BAD_REQUEST, message)
