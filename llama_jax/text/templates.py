"""Jinja chat templates: the ones we export, and running one that came with a tokenizer.

A template is trusted for its text but not for its manners: it runs in jinja2's sandbox with a limit on loop steps. What users
wrote is not trusted at all: before it goes in, `escape_content` marks the places where a control token might begin, and
`Tokenizer.encode_template` makes control tokens only of what carries no mark.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.errors import ExitCode, LlamaError

MAX_LOOP_STEPS = 1_000_000
TAG_ERROR = "special tags are not allowed as part of the prompt"
ROLE_ERROR = (
    "model only supports 'system', 'user' and 'assistant' roles, "
    "starting with 'system', then 'user' and alternating (u/a/u/a/u...)"
)

LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
CODELLAMA_TAGS = (*LLAMA2_TAGS, "<step>")


def _instruct_template(tags: Sequence[str]) -> str:
    return (
        "{% for message in messages %}{% for tag in " + repr(list(tags)) + " %}{% if tag in message['content'] %}"
        "{{ raise_exception('" + TAG_ERROR + "') }}{% endif %}{% endfor %}{% endfor %}"
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set turns = messages[1:] %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
        "{% for turn in turns %}"
        "{% if turn['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
        '{{ raise_exception("' + ROLE_ERROR + '") }}{% endif %}'
        "{% if turn['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + ((system if loop.first else '') + turn['content']).strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + turn['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    )


# In one string the space before "\n\n" stands for the leading space that each of Meta's separate encodings gets.
_SOURCE_TEMPLATE = (
    "{{ bos_token }}{% if not messages or messages[0]['role'] != 'system' %}{{ ' Source: system<step>' }}{% endif %}"
    "{% for message in messages %}{{ ' Source: ' + message['role'] }}"
    "{% if message['destination'] %}{{ '\\nDestination: ' + message['destination'] }}{% endif %}"
    "{% if message['content'] %}{{ ' \\n\\n ' + message['content'].strip() }}{% endif %}{{ '<step>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' Source: assistant\\nDestination: user \\n\\n ' }}{% endif %}"
)

_HEADER_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message['content'].strip() + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

CHAT_TEMPLATES = {
    "llama2": _instruct_template(LLAMA2_TAGS),
    "codellama": _instruct_template(CODELLAMA_TAGS),
    "codellama_70b": _SOURCE_TEMPLATE,
    "llama3": _HEADER_TEMPLATE,
}


class _RefusedError(Exception):
    """raise_exception was called by the template."""


class _StepLimitError(Exception):
    pass


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    now: datetime.datetime,
    *,
    opened: bool = True,
) -> str:
    """The prompt, open for the assistant's answer.

    Args:
        template: Jinja source in the dialect of Hugging Face's chat templates.
        messages: as the template sees them.
        tokens: bos_token and eos_token.
        now: what strftime_now formats.
        opened: false for a conversation that ends here.
    """
    from jinja2 import TemplateError

    steps = iter(range(MAX_LOOP_STEPS))

    def step() -> str:
        if next(steps, None) is None:
            raise _StepLimitError
        return ""

    compiled = _compile(template)
    variables = {"tools": None, "documents": None, "strftime_now": now.strftime, "_step": step, **tokens}
    try:
        return compiled.render(messages=messages, add_generation_prompt=opened, **variables)
    except _RefusedError as e:
        raise LlamaError(ExitCode.BAD_REQUEST, f"the chat template refuses these messages: {e}") from e
    except _StepLimitError as e:
        raise _bad(f"runs more than {MAX_LOOP_STEPS:,} loop steps; it may never end") from e
    except TemplateError as e:
        raise _bad(f"failed: {e}") from e
    except Exception as e:  # whatever a template's expressions can raise
        raise _bad(f"failed: {type(e).__name__}: {e}") from e


def escape_content(
    messages: Sequence[Mapping[str, Any]], specials: Iterable[str], escape: str, *, everywhere: bool
) -> list[dict[str, Any]]:
    """Messages whose content cannot become a control token.

    Args:
        messages: role and content, and whatever else the template reads; roles are left as they are.
        specials: texts of the control tokens.
        escape: a character that appears nowhere else, put before each control token, and at the start of a content that
            could complete one.
        everywhere: also before each character that a control token may begin with. Then the template cannot make one by
            cutting content and joining it again, but it may not find in the content what it looks for.
    """
    specials = [name for name in specials if name]
    firsts = {name[0] for name in specials if not name[0].isspace()}
    tails = {name[i:] for name in specials for i in range(1, len(name))}
    start = (
        re.compile(f"(?={'|'.join(map(re.escape, firsts if everywhere else specials))})") if specials else re.compile("(?!)")
    )

    def marked(text: str) -> str:
        body = text.lstrip()  # templates strip: an escape inside the space around a text would stop them
        completes = bool(body) and any(tail.startswith(body) or body.startswith(tail) for tail in tails)
        return text[: len(text) - len(body)] + (escape if completes else "") + start.sub(escape, body)

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return marked(value)
        if isinstance(value, Mapping):
            return {key: item if key == "role" else walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list | tuple) else value

    return [walk(message) for message in messages]


def unused_character(texts: Iterable[str]) -> str:
    """A private-use character that none of the texts contains."""
    used = set().union(*map(set, texts))
    return next(c for c in map(chr, [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)]) if c not in used)


@functools.lru_cache(maxsize=8)
def _compile(template: str):
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks the assistant's words for training; here its body is all that counts."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    try:
        tree = environment.parse(template)
        for loop in tree.find_all((nodes.For, nodes.Macro)):  # count the turns of every loop and every call
            count = nodes.Output([nodes.Call(nodes.Name("_step", "load"), [], [], None, None)])
            loop.body.insert(0, count.set_lineno(loop.lineno))
        return environment.from_string(tree)
    except TemplateSyntaxError as e:
        raise _bad(f"cannot be parsed, line {e.lineno}: {e.message}") from e


def _raise(message: str) -> None:
    raise _RefusedError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bad(what: str) -> LlamaError:
    return LlamaError(ExitCode.BAD_TOKENIZER, f"the tokenizer's chat template {what}; use another chat format, or repair it")
