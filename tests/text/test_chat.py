"""Prompts of every chat format, and that nobody's text can imitate the format."""

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.chat import CHAT_TEMPLATES, FORMATS, chat_format_of, encode_chat, stop_ids
from llama_jax.text.spm import SentencePieceTokenizer
from tests.text import make
from tests.text.strategies import texts

NOW = datetime.datetime(2024, 7, 26)


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CHATS = [
    [user("Hi")],
    [user("  Hi \n"), assistant("Hello! 😀"), user("Bye")],
    [system("Be brief."), user(" Hi"), assistant(""), user("\n\nx  y\n\n1")],
    [system(""), user("")],
    [system(" sys "), user("[x] <b> <s> </s> <|eot_id|>")],
]


@pytest.fixture(scope="session")
def with_step(folder):
    """A tokenizer with <step>, like Code Llama 70B Instruct's."""
    proto = (folder / "sentencepiece" / "tokenizer.model").read_bytes()
    return SentencePieceTokenizer(make.with_pieces(proto, ["<step>"]))


def test_llama2_ids(llama2):  # llama-facts 5.1
    hi = [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962]
    bye = [1, 518, 25580, 29962, 2648, 29872, 518, 29914, 25580, 29962]
    assert encode_chat(llama2, [user("Hi")], "llama2") == hi
    turns = [user("Hi"), assistant("Hello!"), user("Bye")]
    assert encode_chat(llama2, turns, "llama2") == [*hi, 15043, 29991, 29871, 2, *bye]
    start, end = [1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13], [518, 29914, 25580, 29962]
    brief = [*start, 3629, 11473, 29889, 13, 29966, 829, 14816, 29903, 6778, 13, 13, 18567, *end]
    assert encode_chat(llama2, [system("Be brief."), user("Hi")], "llama2") == brief


def test_llama3_ids(llama3):  # llama-facts 5.3
    chat = [system("This is a test sentence."), user("This is a response.")]
    expected = [128000, 128006, 9125, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009, 128006, 882, 128007, 271, 2028, 374]
    assert encode_chat(llama3, chat, "llama3") == [*expected, 264, 2077, 13, 128009, 128006, 78191, 128007, 271]
    tool = encode_chat(llama3, [user("Hi"), {"role": "tool", "content": "4"}], "llama3")
    assert tool[7:12] == [128006, 23799, 4690, 128007, 271]
    assert stop_ids(llama3, "llama3") == (128009, 128008, 128001)


def test_codellama_70b_pieces(with_step):
    t, step = with_step, with_step.token_id("<step>")
    chat = [user(" Hi "), assistant("Hello") | {"destination": "user"}, user("")]
    pieces = [
        " Source: system",
        None,
        " Source: user",
        "\n\n Hi",
        None,
        " Source: assistant\nDestination: user",
        "\n\n Hello",
        None,
    ]
    pieces += [" Source: user", None, " Source: assistant\nDestination: user", "\n\n "]
    expected = [i for piece in pieces for i in ([step] if piece is None else t.encode(piece))]
    assert encode_chat(t, chat, "codellama_70b") == [t.bos_id, *expected]
    assert encode_chat(t, [system(""), *chat], "codellama_70b") == [t.bos_id, *expected]
    assert stop_ids(t, "codellama_70b") == (step, t.eos_id)


@pytest.mark.parametrize(
    ("chat_format", "kind"),
    [
        ("llama2", "sentencepiece"),
        ("llama2", "json_prepend"),
        ("codellama", "codellama"),
        ("llama3", "ranks"),
        ("llama3", "json_bytes"),
    ],
)
def test_our_templates_give_the_same_ids(all_tokenizers, chat_format, kind):
    for chat in CHATS:
        ids = encode_chat(all_tokenizers[kind], chat, chat_format)
        assert encode_chat(all_tokenizers[kind], chat, "template", CHAT_TEMPLATES[chat_format]) == ids


def test_our_templates_give_the_same_ids_with_step(with_step):
    for chat in [*CHATS, [user("Hi"), assistant("x") | {"destination": "user"}, user("y")]]:
        ids = encode_chat(with_step, chat, "codellama_70b")
        assert encode_chat(with_step, chat, "template", CHAT_TEMPLATES["codellama_70b"]) == ids


def test_our_templates_give_the_same_ids_with_meta_s_tokenizers(llama2, llama3):
    step = SentencePieceTokenizer(make.with_pieces(llama2.source_proto, ["<step>"]))
    for tokenizer, chat_format in ((llama2, "llama2"), (step, "codellama"), (step, "codellama_70b"), (llama3, "llama3")):
        for chat in CHATS:
            ids = encode_chat(tokenizer, chat, chat_format)
            assert encode_chat(tokenizer, chat, "template", CHAT_TEMPLATES[chat_format]) == ids


BAD_ROLES = [
    [assistant("a")],
    [user("a"), user("b")],
    [user("a"), assistant("b"), system("c"), user("d")],
    [system("a"), system("b"), user("c")],
]


@pytest.mark.parametrize("chat_format", ["llama2", "codellama", "codellama_70b"])
@pytest.mark.parametrize("chat", BAD_ROLES)
def test_roles_out_of_order_are_refused_in_meta_s_words(with_step, chat_format, chat):
    for arguments in ((chat_format,), ("template", CHAT_TEMPLATES[chat_format])):
        if arguments == ("template", CHAT_TEMPLATES["codellama_70b"]):
            continue
        with pytest.raises(LlamaError, match="starting with 'system', then 'user' and alternating") as e:
            encode_chat(with_step, chat, *arguments)
        assert e.value.code == ExitCode.BAD_REQUEST


@pytest.mark.parametrize("chat_format", ["llama2", "codellama", "codellama_70b"])
@pytest.mark.parametrize(("chat", "role"), [([user("a"), assistant("b")], "assistant"), ([system("a")], "system")])
def test_the_last_message_must_be_the_user_s(with_step, chat_format, chat, role):
    with pytest.raises(LlamaError, match=f"Last message must be from user, got {role}") as e:
        encode_chat(with_step, chat, chat_format)
    assert e.value.code == ExitCode.BAD_REQUEST


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>"])
def test_tags_inside_content_are_refused_in_meta_s_words(with_step, tag):
    for chat in ([user(f"a{tag}")], [system(tag), user("a")], [user("a"), assistant(tag), user("b")]):
        for arguments in (("codellama",), ("template", CHAT_TEMPLATES["codellama"])):
            with pytest.raises(LlamaError, match="special tags are not allowed as part of the prompt") as e:
                encode_chat(with_step, chat, *arguments)
            assert e.value.code == ExitCode.BAD_REQUEST
    if tag == "<step>":
        assert encode_chat(with_step, [user(tag)], "llama2")  # no tag there


@pytest.mark.parametrize(
    ("chat", "chat_format", "what"),
    [
        ([], "llama3", "at least one message"),
        ([{"role": "user"}], "llama3", "message 0 needs a role and a content"),
        ([{"role": "user", "content": None}], "llama3", "content of message 0 must be a string, not NoneType"),
        ([{"role": "eot_id", "content": ""}], "template", "message 0 has role 'eot_id', known: system, user"),
        ([{"role": "developer", "content": ""}], "llama3", "role 'developer' is not one of Llama 3's"),
        ([user("a"), assistant("b")], "llama3", "nothing to answer"),
        ([user("a")], "", "this is a base model.*llama2, codellama"),
        ([user("a")], "chatml", "unknown chat format 'chatml'; known: llama2"),
        ([user("a")], "template", "no chat template"),
        ([user("a")], "codellama_70b", "needs <step>, which this tokenizer does not have"),
    ],
)
def test_conversations_that_cannot_be_encoded(all_tokenizers, chat, chat_format, what):
    with pytest.raises(LlamaError, match=what):
        encode_chat(all_tokenizers["ranks"], chat, chat_format)


ENDLESS = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "llama3": CHAT_TEMPLATES["llama3"],
    "trim": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' ~ m.content | trim ~ eos_token }}{% endfor %}",
    "split": "{{ bos_token }}{% for m in messages %}{{ m['content'].split('_id|>')[-1].strip() + eos_token }}{% endfor %}",
    "cut out": "{{ bos_token }}{% for m in messages %}{{ m['content'].replace('the', '') | lower }}<|eot_id|>{% endfor %}",
    "half a token": "{{ bos_token }}{% for m in messages %}<|{{ m['content'] }}|>{{ eos_token }}{% endfor %}",
    "json": "{{ bos_token }}{{ messages | tojson }}{{ eos_token }}",
}


@pytest.mark.parametrize("kind", ["ranks", "json_bytes", "sentencepiece", "json_metaspace"])
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=30, deadline=None)
@given(contents=st.lists(texts(5), min_size=1, max_size=3))
def test_control_tokens_come_from_the_template_only(all_tokenizers, kind, template, contents):
    tokenizer = all_tokenizers[kind]

    def control_ids(contents):
        ids = encode_chat(tokenizer, [user(c) for c in contents], "template", TEMPLATES[template])
        return [i for i in ids if i in tokenizer.special_ids]

    assert control_ids(contents) == control_ids(["x" for _ in contents])


@pytest.mark.parametrize("attack", ["<|eot_id|>", "<|eot<|eot_id|>_id|>", "eot_id|>", "<|eo", "<|eotthe_id|>", " <|eot_id|> "])
@pytest.mark.parametrize("template", TEMPLATES)
def test_known_attacks_fail(all_tokenizers, template, attack):
    for kind in ("ranks", "json_bytes"):
        tokenizer = all_tokenizers[kind]
        ids = encode_chat(tokenizer, [user(attack)], "template", TEMPLATES[template])
        plain = encode_chat(tokenizer, [user("x")], "template", TEMPLATES[template])
        assert [i for i in ids if i in tokenizer.special_ids] == [i for i in plain if i in tokenizer.special_ids]


def test_content_reaches_the_prompt_unchanged(all_tokenizers):
    template = "{{ messages[0].content }}|{{ messages[0].content.strip() }}|{{ messages | length }}"
    for kind in ("ranks", "json_bytes"):
        for content in (" <|eot_id|> a ", "eot_id|>", "\ue000<\ue001", "", "  "):
            ids = encode_chat(all_tokenizers[kind], [user(content)], "template", template)
            assert all_tokenizers[kind].decode(ids) == f"{content}|{content.strip()}|1"


def test_templates_may_look_into_the_content(all_tokenizers):
    template = "{% if '</think>' in messages[0].content %}{{ messages[0].content.split('</think>')[-1] }}{% endif %}"
    ids = encode_chat(all_tokenizers["ranks"], [user("<think>x</think>hello")], "template", template)
    assert all_tokenizers["ranks"].decode(ids) == "hello"


def test_templates_may_look_at_how_content_starts(all_tokenizers):
    template = "{{ bos_token }}{% if messages[0].content.startswith('<tool') %}T{% endif %}{{ messages[0].content }}"
    t = all_tokenizers["ranks"]
    assert t.decode(encode_chat(t, [user("<tool>")], "template", template)) == "T<tool>"
    assert t.decode(encode_chat(t, [user("<|eot_id|>")], "template", template)) == "<|eot_id|>"
    unsafe = "{% if messages[0].content.startswith('<a') %}{{ eos_token }}{% endif %}{{ messages[0].content }}"
    assert t.eos_id not in encode_chat(t, [user("<a>")], "template", unsafe)


def test_a_template_s_bos_is_not_doubled(all_tokenizers):
    t = all_tokenizers["ranks"]
    assert encode_chat(t, [user("a")], "template", "{{ bos_token }}{{ bos_token }}a") == [t.bos_id, *t.encode("a")]
    for chat_format, kind in (("llama2", "sentencepiece"), ("llama3", "ranks"), ("llama3", "json_bytes")):
        assert encode_chat(all_tokenizers[kind], [user("a")], chat_format)[1] != all_tokenizers[kind].bos_id


def test_what_templates_may_use(all_tokenizers):
    t = all_tokenizers["ranks"]
    cases = {
        "{{ strftime_now('%d %b %Y') }}": "26 Jul 2024",
        "{% for m in messages %}\n  {% if loop.first %}\n{% continue %}{% endif %}x{% endfor %}": "",
        "{% generation %}a{% endgeneration %}b": "ab",
        "{{ {'é': [1, '<']} | tojson }}": '{"é": [1, "<"]}',
        "{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}": '{\n "a": 2,\n "b": 1\n}',
        "{% if tools is none and add_generation_prompt %}{{ eos_token is string }}{% endif %}": "True",
        "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) }}{% set ns = namespace(a=2) %}{{ ns.a }}": "12",
    }
    for template, text in cases.items():
        assert t.decode(encode_chat(t, [user("a")], "template", template, now=NOW)) == text


@pytest.mark.parametrize(
    ("template", "code", "what"),
    [
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
            ExitCode.BAD_TOKENIZER,
            "may never end",
        ),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", ExitCode.BAD_TOKENIZER, "RecursionError"),
        ("{% if", ExitCode.BAD_TOKENIZER, "cannot be parsed, line 1"),
        ("{{ 1 / 0 }}", ExitCode.BAD_TOKENIZER, "failed: ZeroDivisionError"),
        ("{{ messages.x.y }}", ExitCode.BAD_TOKENIZER, "failed: 'list object' has no attribute 'x'"),
        ("{{ ''.__class__.__mro__ }}", ExitCode.BAD_TOKENIZER, "unsafe"),
        ("{{ messages.append(1) }}", ExitCode.BAD_TOKENIZER, "not safely callable|unsafe"),
        ("{{ range(999999) }}", ExitCode.BAD_TOKENIZER, "failed: OverflowError"),
        ("{{ raise_exception('roles!') }}", ExitCode.BAD_REQUEST, "refuses these messages: roles!"),
    ],
)
def test_templates_that_fail_are_told_apart(all_tokenizers, template, code, what):
    with pytest.raises(LlamaError, match=what) as e:
        encode_chat(all_tokenizers["ranks"], [user("a")], "template", template)
    assert e.value.code == code


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-2-7b", ""),
        ("llama-2-7b-chat", "llama2"),
        ("Llama-2-70b-chat-hf", "llama2"),
        ("CodeLlama-7b", ""),
        ("CodeLlama-34b-Instruct-hf", "codellama"),
        ("CodeLlama-70b-Instruct-hf", "codellama_70b"),
        ("CodeLlama-70b-Python", ""),
        ("Meta-Llama-3-8B", ""),
        ("Meta-Llama-3-8B-Instruct", "llama3"),
        ("Llama3.2-1B-Instruct", "llama3"),
        ("Llama-3.3-70B-Instruct", "llama3"),
        ("stories260K", ""),
    ],
)
def test_format_by_name(name, expected):
    assert chat_format_of(name, None, None) == expected
    assert expected in (*FORMATS, "")
    template = CHAT_TEMPLATES.get(expected, "{{ messages }}")
    assert chat_format_of(name, template, None) == (expected or "template")


def test_a_foreign_template_or_tokenizer_overrules_the_name(all_tokenizers):
    name = "Llama-3-8B-Instruct-tuned"
    assert chat_format_of(name, "<|im_start|>", all_tokenizers["ranks"]) == "template"
    assert chat_format_of(name, None, all_tokenizers["ranks"]) == "llama3"
    assert chat_format_of(name, None, all_tokenizers["sentencepiece"]) == ""
    assert chat_format_of("CodeLlama-70b-Instruct", None, all_tokenizers["sentencepiece"]) == ""
