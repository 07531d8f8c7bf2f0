"""verify passes on what convert makes, and says where and why when a checkpoint is not its source."""

import dataclasses
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama_jax import verify as command
from llama_jax.checkpoint.source import open_source
from llama_jax.checkpoint.store import Checkpoint
from llama_jax.commands.convert import convert
from llama_jax.commands.verify import Report, verify
from llama_jax.errors import ExitCode, run_command
from llama_jax.model.block import Block
from tests.checkpoint.make import Params, meta_tiny, random_params, write_huggingface, write_llama2c, write_meta
from tests.checkpoint.test_save import save

CFG = meta_tiny(embed_dim=48, head_dim=8, num_heads=6)  # N * H = D: wo is square, and so can be transposed unseen
ROPES = {
    "theta": dict(rope_theta=1e6),
    "linear": dict(rope_type="linear", rope_factor=4.0),
    "dynamic": dict(rope_type="dynamic", rope_factor=4.0, rope_original_length=16),
    "yarn": dict(rope_type="yarn", rope_factor=4.0, rope_original_length=16, rope_attention_factor=1.1386294361119891),
    "llama3": dict(rope_type="llama3", rope_factor=8.0, rope_original_length=8192, rope_theta=5e5),
}


def assert_verifies(source, output, num_layers=2, **options) -> None:
    convert(source, output, **options)
    report = verify(Checkpoint.open(output), open_source(source, max_length=64), 24)
    assert report.faults == [] and report.tokens == report.greedy_agreement == 24
    assert list(report.errors) == ["embedding", *(f"layer {i}" for i in range(num_layers)), "logits"]
    for place, (error, largest) in report.errors.items():
        assert error <= 1e-5 * largest and largest > 0.01, place


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("kind", ["meta", "huggingface", "llama2c"])
def test_every_format_verifies(tmp_path, kind, num_kv_heads):
    cfg = meta_tiny(num_kv_heads=num_kv_heads, tied_head=num_kv_heads == 1)
    params = random_params(cfg, num_kv_heads)
    if kind == "meta":
        write_meta(tmp_path / "s", cfg, params, 1 if num_kv_heads == 1 else 2, num_kv_heads % 2)
    elif kind == "huggingface":
        write_huggingface(tmp_path / "s", cfg, params, 2)
    else:
        write_llama2c(tmp_path / "s/m.bin", cfg, params, num_kv_heads % 3)
    assert_verifies(tmp_path / "s", tmp_path / "c", max_length=64)


def test_heads_wider_than_the_model_verify(tmp_path):
    cfg = meta_tiny(num_layers=1, head_dim=10)
    write_huggingface(tmp_path / "s", cfg, random_params(cfg))
    assert_verifies(tmp_path / "s", tmp_path / "c", num_layers=1)


@pytest.mark.parametrize("rope", ROPES)
def test_every_kind_of_rope_verifies(tmp_path, rope):
    cfg = meta_tiny(num_layers=1, **ROPES[rope])
    config = huggingface(tmp_path / "s", cfg)
    assert_verifies(tmp_path / "s", tmp_path / "c", num_layers=1)
    assert Checkpoint.open(tmp_path / "c").config == cfg, config


def huggingface(folder, cfg):
    """What make.write_huggingface does not say of dynamic and yarn is added."""
    import json

    write_huggingface(folder, cfg, random_params(cfg, 3))
    config = json.loads((folder / "config.json").read_text())
    if cfg.rope_type == "dynamic":
        config["max_position_embeddings"] = cfg.rope_original_length
    if cfg.rope_type == "yarn":
        config["rope_scaling"]["original_max_position_embeddings"] = cfg.rope_original_length
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("rope", ["theta", "llama3"])
def test_rope_that_meta_can_say_verifies(tmp_path, rope):
    cfg = meta_tiny(num_layers=1, **ROPES[rope])
    write_meta(tmp_path / "s", cfg, random_params(cfg, 4), 2, 0)
    assert_verifies(tmp_path / "s", tmp_path / "c", num_layers=1, max_length=64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_rounding_to_the_checkpoints_dtype_is_no_fault(tmp_path, dtype):
    write_meta(tmp_path / "s", CFG, random_params(CFG), 2)
    assert_verifies(tmp_path / "s", tmp_path / "c", max_length=64, dtype=dtype)


# --- checkpoints that are wrong


def halves(w: np.ndarray) -> np.ndarray:
    """[N, H, D]: rows from interleaved pairs to halves; a conversion does it once to q and k of Meta's."""
    n, h, d = w.shape
    return w.reshape(n, h // 2, 2, d).swapaxes(1, 2).reshape(n, h, d)


def interleaved(w: np.ndarray) -> np.ndarray:
    n, h, d = w.shape
    return w.reshape(n, 2, h // 2, d).swapaxes(1, 2).reshape(n, h, d)


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Params], Params]:
    return lambda params: params | {name: np.ascontiguousarray(change(params[name]))}


def one_value(w: np.ndarray) -> np.ndarray:
    w = w.copy()
    w[-1, -1] += 0.01
    return w


def swapped(a: str, b: str) -> Callable[[Params], Params]:
    return lambda params: params | {a: params[b], b: params[a]}


Q, K, V, O = (f"layers.1.{leaf}_proj" for leaf in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"layers.1.{leaf}_proj" for leaf in ("gate", "up", "down"))
DAMAGES = {
    "q not permuted": (changed(Q, interleaved), f"layer 1: {Q} is not .*rows were not permuted from interleaved RoPE pairs"),
    "k not permuted": (changed(K, interleaved), f"layer 1: {K} is not .*rows were not permuted from interleaved RoPE pairs"),
    "q permuted twice": (changed(Q, halves), f"layer 1: {Q} is not the source's .likely cause: its rows were permuted twice"),
    "k permuted twice": (changed(K, halves), f"layer 1: {K} is not the source's .likely cause: its rows were permuted twice"),
    "o transposed": (
        changed(O, lambda w: w.reshape(48, 48).T.reshape(w.shape)),
        f"layer 1: {O} is not the source's .likely cause: it was transposed",
    ),
    "down transposed": (
        changed(DOWN, lambda w: w.T.reshape(w.shape)),
        f"layer 1: {DOWN} is not the source's .likely cause: it was transposed",
    ),
    "other values": (changed(V, lambda w: w + 1), f"layer 1: {V} is not the source's .likely cause: other values .100.0%"),
    "one value": (changed(DOWN, one_value), f"layer 1: {DOWN} is not the source's .likely cause: other values .0.0% of them"),
    "gate and up swapped": (swapped(GATE, UP), f"layer 1: {GATE} is not the source's .likely cause: "),
    "norms swapped": (swapped("layers.1.attn_norm", "layers.1.mlp_norm"), "layer 1: layers.1.attn_norm is not the source's"),
    "layers swapped": (swapped("layers.0.v_proj", "layers.1.v_proj"), "layer 0: layers.0.v_proj is not the source's"),
    "embedding": (changed("embedding", one_value), "embedding: embedding is not the source's .likely cause: other values"),
    "final norm": (changed("final_norm", lambda w: w * 2), "logits: final_norm is not the source's"),
    "head": (changed("lm_head", one_value), "logits: lm_head is not the source's .likely cause: other values"),
    "not a number": (changed(UP, lambda w: w * np.float32(np.nan)), f"layer 1: {UP} is not the source's"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Meta's, from which q and k are permuted."""
    folder = tmp_path_factory.mktemp("verify") / "meta"
    write_meta(folder, CFG, random_params(CFG, 8), 2)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; returns exit code, stdout and stderr."""

    def run(*argv) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verify", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            run_command(command.main)
        return stopped.value.code, *capsys.readouterr()

    return run


def verify_unjitted(checkpoint, opened) -> Report:
    """The same without compiling a program for each test; operations are compiled once for all."""
    with jax.disable_jit():
        return verify(checkpoint, opened, 8)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_with_its_place_and_likely_cause(tmp_path, source, damage):
    change, match = DAMAGES[damage]
    checkpoint = save(tmp_path / "c", CFG, change(random_params(CFG, 8)))
    report = verify_unjitted(checkpoint, open_source(source, max_length=64))
    assert report.faults
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(report.faults[0])
    assert list(report.errors) == ["embedding", "layer 0", "layer 1", "logits"]


def test_swapped_gate_and_up_are_called_swapped(tmp_path, source):
    """A well-known mistake: w1 and w3 look alike."""
    checkpoint = save(tmp_path / "c", CFG, swapped(GATE, UP)(random_params(CFG, 8)))
    assert "swapped" in verify_unjitted(checkpoint, open_source(source, max_length=64)).faults[0]


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("rope_theta", 1e6, r"config: rope_theta is 1000000.0, the source says 10000.0 \(likely cause: wrong theta\)"),
        ("norm_eps", 1e-6, r"config: norm_eps is 1e-06, the source says 1e-05 \(likely cause: wrong epsilon\)"),
        ("rope_type", "linear", r"config: rope_type is linear, the source says default \(likely cause: rotary scaling\)"),
        ("num_layers", 1, r"config: num_layers is 1, the source says 2 \(likely cause: another model's config\)"),
        ("num_kv_heads", 3, r"config: num_kv_heads is 3, the source says 2 \(likely cause: wrong number of key/value heads\)"),
    ],
)
def test_a_wrong_config_is_found(tmp_path, source, field, value, match):
    cfg = dataclasses.replace(CFG, **{field: value})
    checkpoint = save(tmp_path / "c", cfg, random_params(cfg, 8))
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(verify_unjitted(checkpoint, open_source(source, max_length=64)).faults[0])


def test_wrong_theta_and_epsilon_show_in_the_numbers_too(tmp_path, source):
    """Layer 0 differs, the embedding does not: both are used in every layer."""
    for name, cfg in {"t": dataclasses.replace(CFG, rope_theta=1e6), "e": dataclasses.replace(CFG, norm_eps=0.1)}.items():
        report = verify(save(tmp_path / name, cfg, random_params(CFG, 8)), open_source(source, max_length=64), 24)
        assert report.errors["embedding"][0] == 0
        assert report.errors["layer 0"][0] > 1e-4 * report.errors["layer 0"][1]


def test_a_head_tied_by_mistake_is_found(tmp_path, source):
    params = random_params(CFG, 8)
    del params["lm_head"]
    checkpoint = save(tmp_path / "c", dataclasses.replace(CFG, tied_head=True), params)
    report = verify_unjitted(checkpoint, open_source(source, max_length=64))
    assert report.faults[0] == "config: tied_head is True, the source says False (likely cause: tied head)"
    assert any(fault.endswith("the checkpoint's head is tied to the embedding, the source's is not") for fault in report.faults)


def test_a_head_untied_by_mistake_is_found(tmp_path):
    cfg = meta_tiny(tied_head=True)
    write_huggingface(tmp_path / "s", cfg, random_params(cfg))
    checkpoint = save(tmp_path / "c", dataclasses.replace(cfg, tied_head=False), random_params(meta_tiny()))
    faults = verify_unjitted(checkpoint, open_source(tmp_path / "s")).faults
    assert faults[0] == "config: tied_head is False, the source says True (likely cause: tied head)"
    assert any(fault.startswith("logits: lm_head is not the source's") for fault in faults)


def test_a_wrong_computation_is_found_when_the_weights_are_equal(tmp_path, monkeypatch):
    write_huggingface(tmp_path / "s", CFG, random_params(CFG))
    convert(tmp_path / "s", tmp_path / "c")
    apply = Block.apply
    monkeypatch.setattr(Block, "apply", lambda self, *args: (apply(self, *args)[0] * jnp.float32(1.001), None))
    report = verify(Checkpoint.open(tmp_path / "c"), open_source(tmp_path / "s"), 8)
    assert report.faults == [
        "layer 0: the weights are equal and the results are not: llama_jax computes this wrongly; report it"
    ]


# --- the command


def test_the_command_prints_each_place_and_a_verdict(tmp_path, source, run):
    save(tmp_path / "c", CFG, random_params(CFG, 8))
    code, out, err = run("--checkpoint", tmp_path / "c", "--source", source, "--tokens", 16)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "place        largest difference, of largest value"
    assert [line[:12].strip() for line in lines[1:5]] == ["embedding", "layer 0", "layer 1", "logits"]
    assert lines[5] == "greedy agreement: 16 of 16 positions" and lines[6].startswith(
        "verdict: equal (every weight to the bit;"
    )


def test_the_command_fails_with_code_30_and_the_first_fault_on_one_line(tmp_path, source, run):
    params = DAMAGES["q not permuted"][0](DAMAGES["other values"][0](random_params(CFG, 8)))
    save(tmp_path / "c", CFG, params)
    code, out, err = run("--checkpoint", tmp_path / "c", "--source", source, "--tokens", 16)
    assert code == ExitCode.NOT_EQUAL and out.splitlines()[-1] == "verdict: NOT equal"
    lines = err.splitlines()
    assert lines[-1].startswith(f"error: layer 1: {Q} is not the source's (likely cause: its rows were not permuted")
    assert lines[0].startswith(f"  layer 1: {V} is not the source's") and "Traceback" not in err


def test_the_command_refuses_what_is_no_checkpoint_or_no_source(tmp_path, source, run):
    save(tmp_path / "c", CFG, random_params(CFG, 8))
    assert run("--checkpoint", tmp_path, "--source", source)[0] == ExitCode.NOT_A_CHECKPOINT
    assert run("--checkpoint", tmp_path / "c", "--source", tmp_path)[0] == ExitCode.NO_WEIGHTS
    for tokens in (0, 65):
        code, _, err = run("--checkpoint", tmp_path / "c", "--source", source, "--tokens", tokens)
        assert code == 2 and f"--tokens is {tokens}, expected 1 to the context of 64" in err


def test_a_bfloat16_source_verifies(tmp_path):
    write_huggingface(tmp_path / "s", CFG, random_params(CFG, 0, ml_dtypes.bfloat16), 3)
    assert_verifies(tmp_path / "s", tmp_path / "c")
