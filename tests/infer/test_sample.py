"""infer.sample: text on stdout, in the order of the prompts, and nothing else there."""

import json

import pytest

from configs.sample import get_config
from infer import sample
from llama_jax.generation.request import Settings
from tests.generation.make import full_logprobs

PROMPTS = ["The child found", "She", "Nobody said hello"]
SETTINGS = Settings(temperature=1.0, top_p=1.0, seed=7, max_new_tokens=40, ignore_eos=True)


def config_of(**sampling):
    config = get_config()
    config.max_new_tokens = SETTINGS.max_new_tokens
    for name, value in (dict(temperature=1.0, top_p=1.0, seed=7, ignore_eos=True) | sampling).items():
        config.sampling[name] = value
    return config


@pytest.mark.parametrize("echo", [True, False])
def test_texts_come_in_the_order_of_the_prompts(given, llama, capsys, echo):
    given(sample, config_of(echo=echo), PROMPT=PROMPTS)
    sample.main()
    texts = [completion.text for completion in llama.generate(PROMPTS, SETTINGS, echo=echo)]
    assert capsys.readouterr() == ("".join(text + "\n" for text in texts), "")


def test_several_answers_stand_together(given, llama, capsys):
    given(sample, config_of(n=2), PROMPT=PROMPTS[:2])
    sample.main()
    texts = [completion.text for completion in llama.generate(PROMPTS[:2], SETTINGS, n=2, echo=True)]
    assert capsys.readouterr().out == "".join(text + "\n" for text in texts)


def test_without_a_prompt_it_begins_a_text(given, llama, capsys):
    given(sample, config_of(), PROMPT=[])
    sample.main()
    assert capsys.readouterr().out == llama.generate([""], SETTINGS)[0].text + "\n"


def test_reports_are_json_lines_on_stderr(given, llama, capsys):
    given(sample, config_of(logprobs=2), PROMPT=PROMPTS)
    sample.main()
    out, err = capsys.readouterr()
    completions = llama.generate(PROMPTS, SETTINGS, logprobs=2, echo=True)
    assert out == "".join(completion.text + "\n" for completion in completions)
    lines = [json.loads(line) for line in err.splitlines()]
    assert [(line["row"], line["token"]) for line in lines] == [
        (row, token) for row, completion in enumerate(completions) for token in completion.tokens
    ]
    first = full_logprobs(completions[0].prompt_tokens)[-1]
    assert lines[0]["logprob"] == pytest.approx(first[lines[0]["token"]], abs=2e-6 + 1e-5)
    assert lines[0]["top"] == pytest.approx({str(i): first[i] for i in (-first).argsort()[:2]}, abs=2e-6 + 1e-5)


def test_rows_are_kept_in_order_and_the_first_is_shown_as_it_comes():
    asked = []

    def events():
        for event in [(1, "b"), (0, "a"), (2, "c"), (0, "A"), (1, "B"), (2, "C"), (1, "!")]:
            asked.append(event)
            yield event

    streams = sample._in_order(events(), 4)
    first = next(streams)
    assert next(first) == "a" and len(asked) == 2  # shown before the rest exists
    assert "".join(first) == "A"
    assert ["".join(stream) for stream in streams] == ["bB!", "cC", ""]


def test_a_place_to_fill_is_filled(given, capsys):
    class Filler:
        def stream_infill(self, text, settings, suffix_first):
            yield from (text.split(sample.FILL_ME)[0], f"({suffix_first})", text.split(sample.FILL_ME)[1])

    config = config_of()
    config.suffix_first = True
    given(sample, config, model=Filler(), PROMPT=["def f<FILL_ME>:", "a<FILL_ME>b"])
    sample.main()
    assert capsys.readouterr().out == "def f(True):\na(True)b\n"
