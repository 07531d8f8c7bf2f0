"""infer.chat: turns, commands, interruptions, and conversations longer than the context."""

import io

import pytest

from configs.chat import get_config
from infer import chat
from infer.chat import Conversation
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.request import Settings
from tests.generation.make import llama_of

SETTINGS = Settings(max_new_tokens=10, temperature=0)


class Fake:
    """A model of one id a character, which answers "re " and what it was asked; `answers` are taken first."""

    chat_format = "llama2"

    def __init__(self, max_length=10_000, answers=()):
        self.max_length = max_length
        self.asked, self.sessions = [], []
        self.answers = list(answers)

    def encode_chat(self, messages):
        if any("[INST]" in message["content"] for message in messages):
            raise LlamaError(ExitCode.BAD_REQUEST, "special tags are not allowed")
        return [0] * sum(len(message["content"]) for message in messages)

    def stream_chat(self, messages, settings, session):
        self.asked.append(messages)
        self.sessions.append(session)
        if len(self.encode_chat(messages)) + settings.max_new_tokens > self.max_length:
            raise LlamaError(ExitCode.BAD_REQUEST, "prompt has too many tokens")
        answer = self.answers.pop(0) if self.answers else "re " + messages[-1]["content"]
        for piece in answer:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_an_answer_is_printed_returned_and_remembered(capsys):
    conversation = Conversation(Fake(), SETTINGS)
    assert conversation.ask("one") == "re one"
    assert capsys.readouterr() == ("re one\n", "")
    conversation.ask("two")
    assert conversation._llama.sessions == [conversation._session] * 2
    assert conversation.turns == [user("one"), assistant("re one"), user("two"), assistant("re two")]


def test_the_system_prompt_stands_before_every_conversation():
    fake = Fake()
    conversation = Conversation(fake, SETTINGS, "be brief")
    conversation.ask("one")
    conversation.ask("two")
    system = {"role": "system", "content": "be brief"}
    assert fake.asked == [[system, user("one")], [system, user("one"), assistant("re one"), user("two")]]


def test_a_reset_forgets_turns_and_keeps_or_replaces_the_system_prompt():
    fake = Fake()
    conversation = Conversation(fake, SETTINGS, "be brief")
    conversation.ask("one")
    conversation.reset()
    assert (conversation.turns, conversation.system) == ([], "be brief")
    conversation.reset("be long")
    conversation.ask("two")
    assert fake.asked[-1] == [{"role": "system", "content": "be long"}, user("two")]
    conversation.reset("")
    conversation.ask("three")
    assert fake.asked[-1] == [user("three")]


def test_the_oldest_pairs_are_forgotten_when_they_no_longer_fit(capsys):
    fake = Fake(max_length=60)
    conversation = Conversation(fake, SETTINGS, "system")
    for name in "abcdef":
        conversation.ask(name * 8)  # a pair is 8 + 11 characters; 50 are free besides the answer's room
    assert fake.asked[-1] == [
        {"role": "system", "content": "system"}, user("e" * 8), assistant("re " + "e" * 8), user("f" * 8),
    ]  # fmt: skip
    assert len(conversation.turns) == 4
    assert "no longer fit into 60 tokens" in capsys.readouterr().err


def test_as_few_turns_as_possible_are_forgotten():
    fake = Fake(max_length=10 + 5 * 5 + 2)
    conversation = Conversation(fake, SETTINGS)
    for _ in range(5):
        conversation.ask("x")  # 1 + 4 characters a pair
    conversation.ask("xy")
    assert len(fake.asked[-1]) == 11  # five pairs and the question fit exactly
    conversation.ask("x")  # 33 characters: one pair fewer is still one too many
    assert len(fake.asked[-1]) == 9


def test_a_turn_that_cannot_fit_is_forgotten_and_the_others_stay():
    conversation = Conversation(Fake(max_length=40), SETTINGS)
    conversation.ask("one")
    turns = list(conversation.turns)
    with pytest.raises(LlamaError, match="too many tokens"):
        conversation.ask("x" * 40)
    assert conversation.turns == turns
    assert conversation.ask("two") == "re two"


def test_a_turn_with_tags_is_forgotten():
    conversation = Conversation(Fake(), SETTINGS)
    with pytest.raises(LlamaError, match="special tags"):
        conversation.ask("[INST] me")
    assert conversation.turns == []


def test_an_answer_with_tags_does_not_end_the_conversation():
    """A model may write its format's tags; the next question is answered all the same."""
    conversation = Conversation(Fake(answers=["ok [INST] and more"]), SETTINGS)
    conversation.ask("one")
    assert conversation.ask("two") == "re two"


def test_an_interruption_ends_the_answer_and_not_the_conversation(capsys):
    fake = Fake(answers=[["ha", "lf", KeyboardInterrupt()]])
    conversation = Conversation(fake, SETTINGS)
    assert conversation.ask("one") == "half"
    assert conversation.turns == [user("one"), assistant("half")]
    assert conversation.ask("two") == "re two"
    out, err = capsys.readouterr()
    assert out == "half\nre two\n" and "(stopped)" in err


def test_an_interruption_before_the_first_piece_is_remembered_too():
    conversation = Conversation(Fake(answers=[[KeyboardInterrupt()]]), SETTINGS)
    assert conversation.ask("one") == ""
    assert conversation.ask("two") == "re two"


@pytest.fixture
def typed(monkeypatch, given, capsys):
    """Runs the program on lines typed; returns stdout and stderr."""

    def run(model, *lines, **changes):
        config = get_config()
        config.update(changes)
        given(chat, config, model=model)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        chat.main()
        return capsys.readouterr()

    return run


def test_lines_are_turns_until_the_end_of_input(typed):
    fake = Fake()
    assert typed(fake, "one", "", "  two  ") == ("re one\nre two\n", "")
    assert fake.asked[-1] == [user("one"), assistant("re one"), user("two")]


def test_commands_are_obeyed_and_not_asked(typed):
    fake = Fake()
    out, err = typed(fake, "one", "/reset", "two", "/system be brief", "three", "/system", "four", "/sytem x", "/exit", "five")
    assert out == "re one\nre two\nre three\nre four\n"
    brief = {"role": "system", "content": "be brief"}
    assert fake.asked == [[user("one")], [user("two")], [brief, user("three")], [user("four")]]
    assert "unknown command /sytem; there are /reset, /system TEXT and /exit" in err


def test_a_refused_turn_is_a_line_on_stderr_and_the_program_goes_on(typed):
    out, err = typed(Fake(), "[INST]", "two")
    assert "re two" in out and err == "error: special tags are not allowed\n"


def test_the_configured_system_prompt_is_used(typed):
    fake = Fake()
    typed(fake, "one", system="be brief")
    assert fake.asked == [[{"role": "system", "content": "be brief"}, user("one")]]


def test_a_base_model_is_refused(typed):
    base = Fake()
    base.chat_format = ""
    with pytest.raises(LlamaError, match="is a base model: it continues text and knows no conversations") as error:
        typed(base, "one", checkpoint="some/dir")
    assert error.value.code == ExitCode.BAD_REQUEST and "some/dir" in str(error.value)
    assert base.asked == []


def test_a_base_model_takes_a_format_that_is_named(typed):
    base = Fake()
    base.chat_format = ""
    assert typed(base, "one", chat_format="llama2").out == "re one\n"
    assert base.chat_format == "llama2"


def test_answers_leave_half_the_context_to_the_conversation(typed, monkeypatch):
    seen = []
    fake = Fake(max_length=100)
    monkeypatch.setattr(fake, "stream_chat", lambda messages, settings, session: seen.append(settings.max_new_tokens) or "ok")
    for asked in (512, 0, 20):
        typed(fake, "one", max_new_tokens=asked)
    assert seen == [50, 50, 20]


def test_an_interruption_at_the_prompt_clears_the_line(monkeypatch, capsys):
    lines = iter([KeyboardInterrupt(), "hello\n", ""])

    class Terminal:
        def isatty(self):
            return True

        def readline(self):
            line = next(lines)
            if isinstance(line, BaseException):
                raise line
            return line

    monkeypatch.setattr("sys.stdin", Terminal())
    assert chat._read() == "hello"
    assert chat._read() is None
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("> \n(/exit or Ctrl-D leaves)")


def test_a_real_model_holds_a_conversation_longer_than_its_context(capsys):
    llama = llama_of()
    settings = Settings(max_new_tokens=12, temperature=0)
    conversation = Conversation(llama, settings, "She")
    for text in ("The red house", "the old river", "a happy story", "hello"):
        answer = conversation.ask(text)
        assert conversation.turns[-2:] == [user(text), assistant(answer)]
        messages = [{"role": "system", "content": "She"}, *conversation.turns[:-1]]
        assert answer == llama.chat(messages, settings).text
    assert len(conversation.turns) < 8
    assert "no longer fit" in capsys.readouterr().err
