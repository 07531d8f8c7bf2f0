"""Conversations -> the ids a chat model was tuned on, one function per format, plus the tokenizer's own Jinja template.

Formats: "llama2" (Llama 2 chat), "codellama" (Code Llama Instruct 7B to 34B), "codellama_70b", "llama3" (3 to 3.3), "template"
(the Jinja template beside the tokenizer), and "" for a base model, which cannot chat. The parts of a prompt are encoded as
Meta encodes them, one by one; control tokens are put in by id. Content is stripped, as Llama 2, Code Llama and Llama 3 do
(llama-models, which came with 3.1, keeps the space around it).
"""

import datetime
import functools
import re
from collections.abc import Callable, Mapping, Sequence

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

__all__ = ["CHAT_TEMPLATES", "FORMATS", "chat_format_of", "encode_answers", "encode_chat", "stop_ids"]

FORMATS = ("llama2", "codellama", "codellama_70b", "llama3", "template")
ROLES = ("system", "user", "assistant", "tool", "ipython", "developer", "function")

Messages = Sequence[Mapping[str, str]]
Part = tuple[list[int], bool]  # ids, and whether the assistant says them


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
    raise _unknown(chat_format)


def encode_answers(
    tokenizer: Tokenizer,
    messages: Messages,
    chat_format: str,
    template: str | None = None,
    *,
    now: datetime.datetime | None = None,
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation that the assistant has the last word in, and which of them are the assistant's: what is learnt.

    The ids are those with which `encode_chat` begins the same conversation when it goes on (a template may render it
    otherwise then). An answer includes the token that ends it and not the header it is asked for with.

    Args: as for `encode_chat`.

    Raises:
        LlamaError: as `encode_chat`; and BAD_REQUEST when the last message is not the assistant's, or a template renders the
            beginning of a conversation otherwise once it goes on, so that nobody can tell where an answer begins.
    """
    _check(messages)
    if messages[-1]["role"] != "assistant":
        raise _refused(f"the last message is from {messages[-1]['role']}, expected assistant: there is no answer to learn")
    if chat_format == "template":
        parts = _template_answers(tokenizer, messages, template or tokenizer.chat_template, now or datetime.datetime.now())
    elif chat_format in ("llama2", "codellama"):
        parts = _llama2_answers(tokenizer, messages, CODELLAMA_TAGS if chat_format == "codellama" else LLAMA2_TAGS)
    elif chat_format == "codellama_70b":
        parts = _codellama_70b_parts(tokenizer, messages)
    elif chat_format == "llama3":
        parts = _llama3_parts(tokenizer, messages)
    else:
        raise _unknown(chat_format)
    return [i for ids, _ in parts for i in ids], [said for ids, said in parts for _ in ids]


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
    texts = _llama2_texts(messages, tags)
    if len(texts) % 2 == 0:
        raise _refused(f"Last message must be from user, got {messages[-1]['role']}")
    ids: list[int] = []
    for user, assistant in zip(texts[0:-1:2], texts[1::2], strict=True):
        ids += tokenizer.encode(f"[INST] {user.strip()} [/INST] {assistant.strip()} ", bos=True, eos=True)
    return ids + tokenizer.encode(f"[INST] {texts[-1].strip()} [/INST]", bos=True)


def _llama2_answers(tokenizer: Tokenizer, messages: Messages, tags: Sequence[str]) -> list[Part]:
    texts = _llama2_texts(messages, tags)
    parts: list[Part] = []
    for user, assistant in zip(texts[0::2], texts[1::2], strict=True):
        prompt = f"[INST] {user.strip()} [/INST]"
        ids = tokenizer.encode(f"{prompt} {assistant.strip()} ", bos=True, eos=True)
        parts += _cut(ids, tokenizer.encode(prompt, bos=True))
    return parts


def _llama2_texts(messages: Messages, tags: Sequence[str]) -> list[str]:
    """Contents of user and assistant in turn."""
    _refuse_tags(messages, tags)
    texts = [m["content"] for m in messages]
    roles = [m["role"] for m in messages]
    if roles[0] == "system":
        roles = roles[1:]
        texts = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}", *texts[2:]] if roles else []
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise _refused(ROLE_ERROR)
    return texts


def _encode_codellama_70b(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    ids = [i for part, _ in _codellama_70b_parts(tokenizer, messages) for i in part]
    if messages[-1]["role"] != "user":
        raise _refused(f"Last message must be from user, got {messages[-1]['role']}")
    return ids + tokenizer.encode(" Source: assistant\nDestination: user") + tokenizer.encode("\n\n ")


def _codellama_70b_parts(tokenizer: Tokenizer, messages: Messages) -> list[Part]:
    """BOS, then ` Source: role`, the content and <step> for each message; each piece is encoded by itself."""
    step = _control(tokenizer, "<step>", "codellama_70b")
    _refuse_tags(messages, ("<step>",))
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    for i, message in enumerate(messages):
        if message["role"] != ("system" if i == 0 else ("user", "assistant")[(i - 1) % 2]):
            raise _refused(ROLE_ERROR)
    parts: list[Part] = [(tokenizer.encode("", bos=True), False)]
    for message in messages:
        destination = f"\nDestination: {message['destination']}" if message.get("destination") else ""
        parts.append((tokenizer.encode(f" Source: {message['role']}{destination}"), False))
        if message["content"]:
            parts += _cut(tokenizer.encode(f"\n\n {message['content'].strip()}"), tokenizer.encode("\n\n "))
        parts[-1] = (parts[-1][0], parts[-1][1] and message["role"] == "assistant")
        parts.append(([step], message["role"] == "assistant"))
    return parts


def _encode_llama3(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    if messages[-1]["role"] == "assistant":
        raise _refused("the last message is the assistant's: there is nothing to answer")
    ids = [i for part, _ in _llama3_parts(tokenizer, messages) for i in part]
    return ids + _llama3_header(tokenizer, "assistant")


def _llama3_parts(tokenizer: Tokenizer, messages: Messages) -> list[Part]:
    """BOS once, then header, blank line, content and <|eot_id|> for each message."""
    turn = _control(tokenizer, "<|eot_id|>", "llama3")
    parts: list[Part] = [(tokenizer.encode("", bos=True), False)]
    for message in messages:
        parts.append((_llama3_header(tokenizer, message["role"]), False))
        parts.append(([*tokenizer.encode(message["content"].strip()), turn], message["role"] == "assistant"))
    return parts


def _llama3_header(tokenizer: Tokenizer, role: str) -> list[int]:
    if role not in ("system", "user", "assistant", "ipython", "tool"):
        raise _refused(f"role {role!r} is not one of Llama 3's: system, user, assistant, ipython (or tool)")
    start, end = (_control(tokenizer, f"<|{name}_header_id|>", "llama3") for name in ("start", "end"))
    return [start, *tokenizer.encode("ipython" if role == "tool" else role), end, *tokenizer.encode("\n\n")]


def _encode_template(tokenizer: Tokenizer, messages: Messages, template: str | None, now: datetime.datetime) -> list[int]:
    """The rendered template's ids; whatever it does with content (strip, join, split it), content gives no control token.

    Every possible beginning of a control token is escaped, unless the template looks at content and then renders otherwise,
    but with the same control tokens.
    """
    write, escape = _template_writer(tokenizer, messages, template, now, opened=True)
    return _template_ids(tokenizer, write(messages, True), escape)


def _template_answers(tokenizer: Tokenizer, messages: Messages, template: str | None, now: datetime.datetime) -> list[Part]:
    """An answer is what the template adds to the prompt that asks for it, up to the last control token of that.

    A token that spans the end of a prompt and the beginning of an answer belongs to the answer.
    """
    write, escape = _template_writer(tokenizer, messages, template, now, opened=False)
    whole = write(messages, False)
    ids = _template_ids(tokenizer, whole, escape)
    parts, done = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        texts = write(messages[:i], True), write(messages[: i + 1], False)
        if not all(map(whole.startswith, texts)):
            raise _refused(f"the chat template renders what is before or in message {i} otherwise when more follows")
        start, end = (_shared(ids, _template_ids(tokenizer, text, escape)) for text in texts)
        controls = [j for j in range(start, end) if ids[j] in tokenizer.special_ids]
        end = controls[-1] + 1 if controls else end
        parts += [(ids[done:start], False), (ids[start:end], True)]
        done = end
    return [*parts, (ids[done:], False)]


def _template_writer(
    tokenizer: Tokenizer, messages: Messages, template: str | None, now: datetime.datetime, *, opened: bool
) -> tuple[Callable[[Messages, bool], str], str]:
    """What renders these messages, or the first of them (open for an answer, or not), with escaped content; the escape."""
    if not template:
        raise _refused("the tokenizer has no chat template: give one, or name a chat format")
    texts = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
    tokens = {"bos_token": texts.get(tokenizer.bos_id, ""), "eos_token": texts.get(tokenizer.eos_id, "")}
    escape = unused_character([template, *tokenizer.special_tokens, *_strings(messages)])
    specials = tokenizer.special_tokens

    def write(messages: Messages, opened: bool, everywhere: bool) -> str:
        escaped = escape_content(messages, specials, escape, everywhere=everywhere)
        return render(template, escaped, tokens, now, opened=opened)

    plain, strict = (write(messages, opened, everywhere) for everywhere in (False, True))
    control = tokenizer.special_pattern(escape)
    looks_at_content = plain.replace(escape, "") != strict.replace(escape, "")
    everywhere = not (looks_at_content and control.findall(plain) == control.findall(strict))
    return functools.partial(write, everywhere=everywhere), escape


def _template_ids(tokenizer: Tokenizer, prompt: str, escape: str) -> list[int]:
    ids = tokenizer.encode_template(prompt, escape)
    return ids[1:] if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2 else ids


def _cut(ids: list[int], prompt: list[int]) -> list[Part]:
    """The ids of a prompt with its answer, cut where the prompt alone ends, or before a token that spans that place."""
    n = _shared(ids, prompt)
    return [(ids[:n], False), (ids[n:], True)]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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


def _unknown(chat_format: str) -> LlamaError:
    known = ", ".join(FORMATS)
    if not chat_format:
        return _refused(f"this is a base model, it knows no conversations: use a chat model, or name a chat format ({known})")
    return _refused(f"unknown chat format {chat_format!r}; known: {known}")


def _refused(message: str) -> LlamaError:
    return LlamaError(ExitCode.BAD_REQUEST, message)
