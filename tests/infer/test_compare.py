"""infer.compare: numbers that a float64 Llama finds, too; one model in memory at a time; a page that is safe and complete."""

import dataclasses
import errno
import html.parser
import importlib
import json
import types
import weakref
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from etils import epath

from configs.compare import get_config
from infer import compare_page as page
from infer import comparison, program
from infer.compare_plots import BINS, histogram, kl_by_position
from infer.divergence import BLOCK, Divergence, Position, StoredLogits, likeliest, log_softmax, measure
from llama_jax.checkpoint.adapter import adapter_record
from llama_jax.checkpoint.save import Leaf, save_checkpoint
from llama_jax.checkpoint.store import Checkpoint, to_flat, to_tree
from llama_jax.commands.quantize import quantize
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation import load
from llama_jax.generation.request import Settings
from llama_jax.model import LoraConfig, adapter_shapes, merge_adapter
from tests.checkpoint.make import write_huggingface
from tests.checkpoint.save_adapter import save_adapter
from tests.generation.make import CFG, tokenizer_of
from tests.infer import test_program
from tests.model.make import params_of, reference_of
from tests.text.make import small_sentencepiece

with (  # the flags `config`, `text` and `prompt` are those of other programs, too, which a process can define once
    mock.patch.object(program, "define_config"),
    mock.patch.multiple(flags, DEFINE_string=mock.DEFAULT, DEFINE_multi_string=mock.DEFAULT),
):
    compare = importlib.import_module("infer.compare")

TEXTS = ["The child found the red house. " * 8, "She said hello."]
LORA = LoraConfig(rank=2, alpha=2.0, targets=("q_proj", "down_proj"))


def other_params() -> dict:
    """Near params_of(CFG), which differ from it as after some fine-tuning."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: x + 0.1 * jnp.std(x) * rng.normal(size=x.shape).astype(np.float32), params_of(CFG))


def random_adapter() -> dict:
    rng = np.random.default_rng(6)
    shapes = to_flat(adapter_shapes(CFG, LORA, scan=False))
    return to_tree({name: 0.3 * jnp.asarray(rng.normal(size=shape.shape), jnp.float32) for name, shape in shapes.items()})


def write(path, params, config=CFG, tokenizer=None) -> Checkpoint:
    files = (tokenizer,) if tokenizer else ()
    checkpoint = Checkpoint(
        path=epath.Path(path), config=config, dtype=np.dtype(np.float32), tokenizer=tuple(file.name for file in files),
        chat_format="", source={"kind": "test", "path": "nowhere"}, command="pytest <b>",
    )  # fmt: skip
    flat = {name: np.asarray(value) for name, value in to_flat(params).items()}
    leaves = {name: Leaf(value.shape, value.dtype, lambda value=value: value) for name, value in flat.items()}
    save_checkpoint(checkpoint, leaves, tokenizer_files=files)
    return checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two models, an adapter of the first, one of another vocabulary, and one without a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = small_sentencepiece(folder / "tokenizer.model", CFG.vocab_size)
    base = write(folder / "a", params_of(CFG), tokenizer=tokenizer)
    write(folder / "b", other_params(), tokenizer=tokenizer)
    write(folder / "bare", params_of(CFG))
    quantize(folder / "a", folder / "int4", "int4")
    write_huggingface(folder / "source", CFG, {name: np.asarray(value) for name, value in to_flat(params_of(CFG)).items()})
    config = json.loads((folder / "source" / "config.json").read_text())
    del config["max_position_embeddings"]
    (folder / "source" / "config.json").write_text(json.dumps(config))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, text in zip(("long.txt", "short.txt"), TEXTS, strict=True):
        (folder / name).write_text(text)
    checkpoint = Checkpoint(
        path=epath.Path(folder / "lora"), config=CFG, dtype=np.dtype(np.float32), tokenizer=(tokenizer.name,),
        chat_format="", source={"kind": "trained"}, command="train", adapter=adapter_record(LORA, base),
    )  # fmt: skip
    save_adapter(checkpoint, random_adapter(), tokenizer_files=(tokenizer,))
    return folder


@pytest.fixture
def run(models, monkeypatch, tmp_path, capsys):
    """Calls as `run(b="lora")`: the program in this process, on one device; returns numbers, page and comparison."""

    whole = page.page

    def call(a="a", b="b", text=("text.jsonl",), prompt=(), output="report.html", **settings):
        config = get_config()
        config.max_new_tokens, config.sampling.temperature, config.sampling.top_p = 12, 1.0, 1.0
        for name, value in settings.items():
            config.update_from_flattened_dict({name.replace("__", "."): value})
        given = dict(A=a and str(models / a), B=b and str(models / b), TEXT=[str(models / name) for name in text])
        given |= dict(CONFIG=config, PROMPT=list(prompt), OUTPUT=output and str(tmp_path / output))
        for name, value in given.items():
            monkeypatch.setattr(compare, name, types.SimpleNamespace(value=value))
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        made = []
        monkeypatch.setattr(page, "page", lambda found, tokenizer: made.append(found) or whole(found, tokenizer))
        compare.main()
        return json.loads(capsys.readouterr().out), (tmp_path / output).read_text(), made[0]

    return call


def exact(params, rows, window, stride) -> np.ndarray:
    """[P, V] log-probabilities by the equations; each token's window is the first one that holds it and one before it."""
    found = []
    for row in rows:
        begins = [0]
        while begins[-1] + window < len(row):
            begins.append(begins[-1] + stride)
        said = {begin: reference_of(CFG, params, np.array(row[begin : begin + window])) for begin in begins}
        for at in range(1, len(row)):
            begin = next(begin for begin in begins if begin < at < begin + window)
            found.append(log_softmax(said[begin][at - 1 - begin]))
    return np.array(found)


def assert_exact(found, params_a, params_b, window, stride):
    """Divergence and forks of a comparison are those of the reference."""
    rows = [row for _, row in found.texts]
    a, b = (exact(params, rows, window, stride) for params in (params_a, params_b))
    targets = [token for row in rows for token in row[1:]]
    kl = np.sum(np.exp(a) * (a - b), axis=-1)
    divergence = found.divergence
    np.testing.assert_allclose(divergence.kl, kl, rtol=0, atol=1e-4)
    np.testing.assert_allclose(divergence.logprobs_a, a[np.arange(len(a)), targets], rtol=0, atol=1e-4)
    np.testing.assert_allclose(divergence.logprobs_b, b[np.arange(len(b)), targets], rtol=0, atol=1e-4)
    assert np.array_equal(divergence.same_argmax, a.argmax(-1) == b.argmax(-1))
    assert any(found.forks)
    for (one, other), fork in zip(found.samples, found.forks, strict=True):
        assert (fork is None) == (one.tokens == other.tokens)
        if fork is None:
            continue
        assert one.tokens[: fork.at] == other.tokens[: fork.at]
        assert fork.tokens == (one.tokens[fork.at], other.tokens[fork.at])
        for params, said in zip((params_a, params_b), fork.probabilities, strict=True):
            logprobs = log_softmax(reference_of(CFG, params, np.array([*one.prompt, *one.tokens[: fork.at]]))[-1])
            assert said == pytest.approx(tuple(np.exp(logprobs[list(fork.tokens)])), abs=1e-4)
            if one.kind == "greedy":
                chosen = fork.tokens[0] if params is params_a else fork.tokens[1]
                assert chosen == logprobs.argmax()
    return kl


def test_numbers_are_those_of_the_reference(run, models):
    settings = {"window": 32, "stride": 8, "sampling__ignore_eos": True}
    numbers, _, found = run(prompt=["She"], **settings)
    assert [name for name, _ in found.texts] == [f"{models}/text.jsonl:1", f"{models}/text.jsonl:2"]
    assert [row for _, row in found.texts] == [tokenizer_of().encode(text, bos=True) for text in TEXTS]
    assert len(found.texts[0][1]) > 40  # several windows
    kl = assert_exact(found, params_of(CFG), other_params(), 32, 8)
    assert numbers["tokens"] == len(kl) == sum(len(row) - 1 for _, row in found.texts)
    assert numbers["kl_mean"] == pytest.approx(kl.mean(), abs=1e-4) and kl.mean() > 0.01
    assert numbers["kl_median"] == pytest.approx(np.median(kl), abs=1e-4)
    assert numbers["kl_p99"] == pytest.approx(np.percentile(kl, 99), abs=1e-4)
    assert numbers["kl_max"] == pytest.approx(kl.max(), abs=1e-4)
    perplexity = np.exp(-found.divergence.logprobs_b.mean())
    assert numbers["perplexity_b"] == pytest.approx(perplexity, rel=1e-5) and numbers["perplexity_a"] != perplexity
    places = [position.place for position in found.divergence.largest]
    assert np.all(np.diff(kl[places]) <= 1e-6) and kl[places[0]] == kl.max() and len(places) == comparison.NUM_LARGEST
    assert [sample["kind"] for sample in numbers["samples"]] == ["greedy", "sampled"]
    assert numbers["samples"][0]["prompt"] == "She" and numbers["samples"][0]["token_a"] == found.forks[0].tokens[0]
    assert numbers["a"]["bytes"] == 4 * CFG.num_params and numbers["a"]["dtype"] == "float32"


def test_a_model_and_itself_are_the_same(run):
    numbers, written, found = run(b="a", prompt=["She"])
    assert numbers["kl_max"] == 0 and numbers["same_argmax"] == 1
    assert numbers["perplexity_a"] == numbers["perplexity_b"]
    assert found.forks == [None, None] and [sample["same"] for sample in numbers["samples"]] == [True, True]
    assert "Equal: " in written and "<mark>" in written  # the largest are marked, all the same


def test_rounded_weights_are_compared_with_their_floats(run):
    numbers, written, _ = run(b="a", prompt=["She"], b__quantize="int8")
    assert 0 < numbers["kl_mean"] < 0.05
    assert (numbers["a"]["quantize"], numbers["b"]["quantize"]) == ("", "int8")
    assert numbers["b"]["bytes"] < 0.5 * numbers["a"]["bytes"]
    assert "<tr class=differs><th>quantised</th><td>no</td><td>int8</td></tr>" in written


@pytest.mark.parametrize("how", ["its own checkpoint", "an adapter of the other"])
def test_an_adapter_is_a_side(run, models, how):
    more = {"b": "lora"} if how == "its own checkpoint" else {"b": "a", "b__adapter": str(models / "lora")}
    numbers, _, found = run(prompt=["She"], sampling__ignore_eos=True, **more)
    merged = merge_adapter(CFG, params_of(CFG), random_adapter(), LORA)
    assert_exact(found, params_of(CFG), merged, 128, 64)
    assert numbers["kl_mean"] > 1e-3 and numbers["b"]["base"] == str(models / "a")


def test_without_a_text_the_samples_of_a_are_compared(run):
    numbers, written, found = run(text=())
    assert [name for name, _ in found.texts] == ["greedy text 1 of a", "sampled text 1 of a"]
    assert [row for _, row in found.texts] == [[1, *a.tokens] for a, _ in found.samples]
    assert numbers["samples"][0]["prompt"] == "" and "give --text to compare perplexities" in written


@pytest.mark.parametrize(("text", "length"), [("long.txt", 16), ("short.txt", 2)])
def test_without_a_prompt_both_continue_what_the_text_begins_with(run, text, length):
    """Its first 16 tokens, at most half of it: of 58, of 5."""
    _, _, found = run(text=[text])
    (_, row), (greedy, sampled) = found.texts[0], found.samples
    assert [one.prompt for one in (*greedy, *sampled)] == [row[:length]] * 4


def test_a_long_text_is_cut_and_it_is_said(run, capsys):
    with mock.patch.object(comparison.distributed, "note") as note:
        numbers, _, found = run(max_tokens=20, prompt=["She"])
    assert numbers["tokens"] == 20 == len(found.divergence.kl) and [len(row) for _, row in found.texts] == [21]
    assert "the first 20 of" in note.call_args.args[0]


def test_one_model_is_in_memory_at_a_time(run, monkeypatch):
    loaded, read = [], load.Prepared.load

    def watched(side):
        assert all(one() is None for one in loaded)
        loaded.append(weakref.ref(llama := read(side)))
        return llama

    monkeypatch.setattr(load.Prepared, "load", watched)
    run(prompt=["She"])
    assert len(loaded) == 2


def refused(run, match, code=ExitCode.BAD_REQUEST, **given):
    with pytest.raises(LlamaError, match=match) as error:
        run(**given)
    assert error.value.code == code


def test_what_cannot_be_compared_is_refused_before_a_model_is_read(run, models, tmp_path, monkeypatch):
    monkeypatch.setattr(load.Prepared, "load", None)
    refused(run, "no model a: --a=DIR", a=None)
    refused(run, "no model b: --b=DIR", b=None)
    refused(run, "no --output", output=None)
    refused(run, "expected a file in a folder that exists", output="nowhere/report.html")
    refused(run, "expected a file in a folder that exists", output=".")
    refused(run, "max_tokens is 0", max_tokens=0)
    refused(run, "nowhere.txt as UTF-8", text=["nowhere.txt"])
    refused(run, "neither model has a tokenizer", ExitCode.BAD_TOKENIZER, a="bare", b="bare")


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("quantize", "nonsense", "quantize is 'nonsense', expected int8"),
        ("quantize", "int8", "holds int4 weights, and quantize is 'int8'"),
        ("cache_dtype", "int4", "cache_dtype is 'int4', expected auto"),
        ("dtype", "int8", "dtype is 'int8', expected auto"),
    ],
)
def test_a_setting_of_either_side_is_refused_before_a_model_is_read(run, monkeypatch, side, setting, value, match):
    monkeypatch.setattr(load.Prepared, "load", None)
    refused(run, match, **{side: "int4", f"{side}__{setting}": value})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mesh__tensor": 3}, "tensor=3"),
        ({"max_length": -1}, "max_length is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"window": 1}, "window is 1"),
        ({"window": 8, "stride": 8}, "stride is 8"),
    ],
)
def test_what_both_sides_share_is_refused_before_a_model_is_read(run, monkeypatch, settings, match):
    monkeypatch.setattr(load.Prepared, "load", None)
    code = ExitCode.BAD_MESH if "mesh__tensor" in settings else ExitCode.BAD_REQUEST
    refused(run, match, code, **settings)


def test_what_is_assumed_of_weights_that_were_not_converted_is_said_once(run, models, monkeypatch):
    said = []
    monkeypatch.setattr(load, "note", said.append)
    run(b="source", text=["short.txt"])
    assert [line.partition(":")[2] for line in said if "max_position_embeddings" in line] == [
        " config.json has no max_position_embeddings: context set to 2048; --max-length N changes it"
    ]


def test_models_of_other_tokens_are_refused(run, models, tmp_path, monkeypatch):
    monkeypatch.setattr(load.Prepared, "load", None)
    wide = dataclasses.replace(CFG, vocab_size=CFG.vocab_size + 1)
    write(tmp_path / "wide", params_of(wide), wide)
    refused(
        run, "vocabulary of 420 tokens, .*wide of 421: only models of the same", ExitCode.VOCAB_MISMATCH, b=tmp_path / "wide"
    )
    (tmp_path / "other").mkdir()
    other = small_sentencepiece(tmp_path / "other" / "tokenizer.model", CFG.vocab_size - 20)
    refused(run, "differ: it has 420 tokens instead of 400", ExitCode.VOCAB_MISMATCH, b__tokenizer=str(other))


def test_a_side_without_a_tokenizer_has_the_other_ones(run):
    numbers, _, _ = run(b="bare", prompt=["She"])
    assert numbers["kl_max"] == 0


class Page(html.parser.HTMLParser):
    """Tags, attributes, and all text that is not style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


EVIL = "<script>alert(1)</script>&amp;\"'<img src=x onerror=alert(2)>\x00"


class Evil:
    """A tokenizer whose every token is markup."""

    special_ids = frozenset()

    def decode(self, ids, *, skip_special=True, continued=False):
        return EVIL * len(ids)

    def stream(self, *, continued=False):
        return types.SimpleNamespace(push=self.decode, finish=lambda: "")


def a_comparison(**changes):
    facts = dict(
        checkpoint=EVIL, adapter=EVIL, base=EVIL, parameters=1, layers=1, width=1, heads=1, kv_heads=1, vocabulary=9,
        context=9, dtype="float32", quantize="", cache_dtype="auto", bytes=4, source=EVIL, made_by=EVIL,
    )  # fmt: skip
    samples = (comparison.Sample("greedy", [1], [2, 3]), comparison.Sample("greedy", [1], [2]))
    fork = comparison.Fork(1, (3, None), ((0.5, 0.25), (0.125, 1e-9)))
    zeros = np.zeros(2)
    likely = [(1, 0.5), (2, 0.25)]
    divergence = Divergence(zeros, zeros - 1, zeros - 2, zeros == 0, [Position(1, likely, likely)])
    given = dict(
        facts=[facts, facts], samples=[samples], forks=[fork], settings=Settings(), texts=[(EVIL, [1, 2, 3])],
        texts_of_a=False, divergence=divergence,
    )  # fmt: skip
    return comparison.Comparison(**given | changes)


def test_what_models_and_users_write_is_no_markup():
    found = Page(page.page(a_comparison(), Evil()))
    assert not {"script", "img"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]
    shown = EVIL.replace("\x00", "\ufffd")
    for expected in (shown + "the end", f"{shown} 50.00%", f"token 2 of {shown}", "1e-09", "Equal for 1 tokens"):
        assert expected in found.text
    assert "\x00" not in found.text


@pytest.mark.parametrize(
    ("path", "name"),
    [("a", "a"), ("models/a/", "models/a"), ("/x/models/a", "models/a"), ("/x/run/checkpoints/9", "run/checkpoints/9")],
)
def test_a_model_is_called_by_the_end_of_its_path(path, name):
    facts = dict(checkpoint=path, adapter="", quantize="int8", dtype="float32", cache_dtype="int8")
    assert page._name(facts) == f"{name}, int8, int8 cache"


def test_the_page_needs_nothing_but_itself(run):
    written = run(prompt=["She"])[1]
    found = Page(written)
    assert not {"link", "script", "img", "iframe", "object"} & set(found.tags)
    linked = [value for name, value in found.attributes if name in ("href", "xlink:href", "src", "srcset", "action")]
    assert linked and all(value.startswith("#") for value in linked)  # marks of the plots
    assert "@import" not in written and written.replace("url(#", "").count("url(") == 0
    assert "prefers-color-scheme: dark" in written and 'name="viewport"' in written
    ids = [value for name, value in found.attributes if name == "id"]
    used = {value for value in ids if f"#{value}" in written}
    assert all(ids.count(value) == 1 for value in used)  # two plots, and neither takes the other's marks


@pytest.mark.parametrize("size", [1, BINS, 10 * BINS + 7])
def test_plots_take_any_number_of_positions(size):
    values = np.random.default_rng(0).exponential(size=size)
    values[0] = 0.0
    for svg in (kl_by_position(values, [0, size // 2]), histogram(values - 1), histogram(0 * values)):
        assert svg.startswith('<svg role="img" aria-label=') and svg.rstrip().endswith("</svg>")
        assert "#000" not in svg and "var(--text)" in svg and "nan" not in svg.lower()


def test_stored_logits_are_what_was_given():
    logits = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    with StoredLogits(5) as stored:
        assert [stored.append(logits[:3]), stored.append(logits[3:].astype(np.float64)), stored.count] == [0, 3, 7]
        assert np.array_equal(stored.read(2, 4), logits[2:6])
        assert stored.append(logits[:1]) == 7 and np.array_equal(stored.read(7, 1), logits[:1])


def test_a_full_disk_says_what_to_do():
    with StoredLogits(5) as stored:
        stored._file.close()
        stored._file = mock.Mock(write=mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
        with pytest.raises(LlamaError, match=r"lower config\.max_tokens, or name another folder in TMPDIR") as error:
            stored.append(np.zeros((2, 5)))
    assert error.value.code == ExitCode.DISK_FULL


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(LlamaError, match="NaN or infinite") as error:
        log_softmax(np.array([[1.0, np.nan]]))
    assert error.value.code == ExitCode.NOT_FINITE


def test_the_largest_divergences_are_found_across_blocks():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3 * BLOCK + 5, 9)).astype(np.float32)
    with StoredLogits(9) as stored:
        start = stored.append(a[:4]) + 4
        stored.append(a)
        blocks = (b[at : at + BLOCK] for at in range(0, len(b), BLOCK))
        found = measure(stored, start, blocks, [2] * len(b), 6)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a.astype(float), b.astype(float)))
    kl = np.sum(p * np.log(p / q), axis=-1)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-6)
    np.testing.assert_allclose(found.logprobs_b, np.log(q[:, 2]), rtol=1e-6)
    assert [position.place for position in found.largest] == np.argsort(-kl)[:6].tolist()
    first = found.largest[0]
    assert [token for token, _ in first.likeliest_a] == np.argsort(-p[first.place])[:3].tolist()
    assert first.likeliest_b[0][1] == pytest.approx(q[first.place].max())


def test_fewer_tokens_than_are_named_are_all_named():
    assert likeliest(np.log([0.25, 0.75])) == [(1, pytest.approx(0.75)), (0, pytest.approx(0.25))]


def test_a_mistake_on_the_command_line_is_one_line():
    done = test_program.run("compare", "--a=nowhere", "--b=nowhere", "--text=x", "--prompt=x", "--config.b.quantise=int8")
    test_program.assert_one_line_on_stderr(done, ExitCode.BAD_REQUEST, "quantise", "quantize")


def test_the_config_has_every_setting_of_a_model():
    config = get_config()
    assert set(config.a) == set(config.b) == {"checkpoint", "adapter", "tokenizer", "dtype", "quantize", "cache_dtype"}
    assert program.settings(config) == Settings(max_new_tokens=128)
