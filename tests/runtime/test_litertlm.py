"""Packages for LiteRT-LM: the signatures give the bits of `cached.build_cached`'s, the package
holds what the runtime needs, and the runtime, where it is installed, says what `qnpu generate`
says."""

import importlib
from importlib import metadata

import kinds
import numpy as np
import pairwise
import pytest
import tiny
import workspace

from qnpu_jax import deploy
from qnpu_jax.errors import UserError
from qnpu_jax.integer import storage
from qnpu_jax.models.chat import render_chat
from qnpu_jax.models.tokenizer import Tokenizer
from qnpu_jax.output import OutputFolder
from qnpu_jax.runtime import generation, litertlm_package, litertlm_signatures
from qnpu_jax.runtime.litert_backend import LiteRTBackend
from qnpu_jax.runtime.sampling import Sampling
from qnpu_jax.runtime.session import Session
from qnpu_jax.tflite import cached
from qnpu_jax.tflite.forms import Integers
from qnpu_jax.tflite.interpreter import RESOLVERS, open_interpreter
from qnpu_jax.tflite.named_forms import FORMS

CHUNK, CONTEXT = 4, 24
PARTS = ((0, 4), (4, 1), (5, 3), (8, 1), (9, 1), (10, 4), (14, 2))
"""First position and tokens of each call; a chunk of fewer than CHUNK is filled up."""
IDS = tiny.random_ids((16,), 3)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PREFILL, SLOTS, MOST = 32, 160, 24
REPLACEMENT = generation.REPLACEMENT


class Host:
    """Calls the signatures as LiteRT-LM's executor does: what fills up a chunk is token 0 at
    position 0, and each cache that comes out goes in."""

    def __init__(self, path, kernels):
        interpreter = open_interpreter(path, kernels)
        self.runners = {
            CHUNK: interpreter.get_signature_runner(f"prefill_{CHUNK}"),
            1: interpreter.get_signature_runner("decode"),
        }
        details = self.runners[1].get_input_details()
        self.caches = {
            n: np.zeros(d["shape"], d["dtype"]) for n, d in details.items() if "cache" in n
        }

    def feed(self, ids, start):
        tokens = 1 if len(ids) == 1 else CHUNK
        filled = {
            "tokens": np.zeros((1, tokens), np.int32),
            "input_pos": np.zeros(tokens, np.int32),
        }
        filled["tokens"][0, : len(ids)] = ids
        filled["input_pos"][: len(ids)] = np.arange(start, start + len(ids))
        out = self.runners[tokens](**filled, **self.caches)
        self.caches = {n: out[n] for n in self.caches}
        return out.get("logits")


def test_every_profile_says_the_same(tmp_path):
    model, ids = tiny.quantized("gqa_llama3", "w4a8"), IDS[: CHUNK + 1]
    logits, sizes = [], set()
    for name, form in FORMS.items():
        path = tmp_path / f"{name}.tflite"
        litertlm_signatures.write_signatures(form(model), path, CHUNK, CONTEXT)
        sizes.add(path.stat().st_size)
        host = Host(path, "opt")
        host.feed(ids[:CHUNK], 0)
        logits.append(host.feed(ids[CHUNK:], CHUNK))
    assert len(sizes) == len(FORMS)  # three different files
    for others in logits[1:]:
        np.testing.assert_array_equal(others, logits[0])


@pytest.mark.slow
@pairwise.parametrize(
    ("name", "kernels", "plan"),
    tiny.NAMES,
    [*RESOLVERS],
    ["w8a8", "w4a8s8", "w8a8i8", "w4a16", "apart"],
    choose=pairwise.levels,
)
def test_the_signatures_give_the_bits_of_the_other_form(tmp_path, name, kernels, plan):
    compare_with_cached(tmp_path, tiny.quantized(name, plan), kernels)


@pytest.mark.slow
@pairwise.parametrize(
    ("name", "kernels", "plan"), [*kinds.CONFIGS], [*RESOLVERS], ["apart", "w8a8", "w4a16"]
)
def test_windows_are_made_in_the_graph(tmp_path, name, kernels, plan):
    """Of 6 positions, while PARTS move past 16."""
    compare_with_cached(tmp_path, kinds.quantized(name, plan), kernels)


def compare_with_cached(tmp_path, model, kernels):
    paths = tmp_path / "lm.tflite", tmp_path / "cached.tflite"
    litertlm_signatures.write_signatures(Integers(model), paths[0], CHUNK, CONTEXT)
    cached.build_cached(model, CHUNK, CONTEXT).write(paths[1])
    host, backend = Host(paths[0], kernels), LiteRTBackend(paths[1], kernels)
    session = Session(backend)
    zero_point = int(model.tensors["head.logits"].zero_point)
    for start, count in PARTS:
        ids = IDS[start : start + count]
        logits = host.feed(ids, start)
        codes = session.step(np.resize(ids, 1 if count == 1 else CHUNK), count).logits
        if count == 1:
            assert logits is not None
            got = np.rint(logits[0] / backend.logit_scale) + zero_point
            np.testing.assert_array_equal(got, codes)
    for letter, cache in (("k", session.k), ("v", session.v)):
        for layer, rows in enumerate(cache):
            got = host.caches[f"kv_cache_{letter}_{layer}"][0]
            axis = {"k": 1, "v": 2}[letter]
            filled = (*[slice(None)] * axis, slice(session.filled))
            np.testing.assert_array_equal(got[filled], rows[filled])


def test_the_cache_can_be_filled_to_the_last_slot(tmp_path):
    model, ids = tiny.quantized("gqa_llama3", "w8a8"), tiny.random_ids((CONTEXT,), 4)
    litertlm_signatures.write_signatures(Integers(model), tmp_path / "lm.tflite", CHUNK, CONTEXT)
    host, stepped = (Host(tmp_path / "lm.tflite", "opt") for _ in range(2))
    for start in range(0, CONTEXT - CHUNK, CHUNK):
        host.feed(ids[start : start + CHUNK], start)
    *_, last = [host.feed(ids[i : i + 1], i) for i in range(CONTEXT - CHUNK, CONTEXT)]
    *_, logits = [stepped.feed(ids[i : i + 1], i) for i in range(CONTEXT)]
    np.testing.assert_array_equal(last, logits)


@pytest.mark.parametrize("prefix", [(), tiny.PREFIX])
def test_only_the_logits_are_floats(tmp_path, prefix):
    form = Integers(tiny.quantized("gqa_llama3", "w8a8", prefix))
    litertlm_signatures.write_signatures(form, tmp_path / "lm.tflite", CHUNK, CONTEXT)
    interpreter = open_interpreter(tmp_path / "lm.tflite", "ref")
    floats = [
        [d["name"] for d in interpreter.get_tensor_details(graph) if d["dtype"] == np.float32]
        for graph in (0, 1)
    ]
    assert floats == [[], ["logits.real", "logits"]]


def test_a_context_needs_room_for_a_cache(tmp_path):
    form = Integers(tiny.quantized("gqa_llama3", "w8a8"))
    with pytest.raises(UserError, match="context: 4 positions for 4 new tokens"):
        litertlm_signatures.write_signatures(form, tmp_path / "lm.tflite", CHUNK, CHUNK)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("template", "called"),
    [
        ("{% for m in messages %}{{ m.get('role', '') }}{% endfor %}", ".get()"),
        ("{{ messages[0].content.strip().split('x')[0] }}", ".split(), .strip()"),
    ],
)
def test_methods_of_python_are_refused(tmp_path, template, called):
    """LiteRT-LM's Jinja has none: the package would answer nothing but errors."""
    tiny_model = workspace.write_tiny_model(tmp_path / "model")
    (tiny_model / "chat_template.jinja").write_text(template)
    form = Integers(tiny.quantized("gqa_llama3", "w8a8"))
    with pytest.raises(UserError) as error:
        litertlm_package.write_package(form, tiny_model, tmp_path / "m.litertlm", CHUNK, CONTEXT)
    assert str(error.value).startswith(f"model: the chat template calls {called}; expected no met")
    assert not (tmp_path / "m.litertlm").exists()


def test_without_the_extra_it_is_named(refused, no_packages):
    said = refused("export", "out", "m.litertlm", "--litertlm")
    assert 'litert-lm-builder: not installed; install qnpu\'s extra "litertlm"' in said


@pytest.mark.parametrize("got", ["0.9.2", "0.17.0"])
def test_an_old_builder_is_refused(monkeypatch, got):
    monkeypatch.setattr(metadata, "version", lambda name: got)
    with pytest.raises(UserError, match=f"litert-lm-builder: version {got}, expected 0.18 or"):
        litertlm_package.load_builder()


@pytest.fixture
def builder():
    """Skips where the extra is missing."""
    pytest.importorskip("litert_lm_builder")
    return litertlm_package.load_builder()


@pytest.fixture
def runtime():
    """Skips where LiteRT-LM is missing."""
    return pytest.importorskip("litert_lm")


def test_the_package_holds_what_the_runtime_needs(qnpu, here, builder):
    arguments = "export out m.litertlm --litertlm --prefill 32 --context 64"
    status, out, err = qnpu(*arguments.split())
    assert status == 0, err
    assert out.startswith("wrote m.litertlm")
    builder.unpack("m.litertlm", "unpacked")
    (model,) = (here / "unpacked").rglob("*.tflite")
    signatures = open_interpreter(model, "ref").get_signature_list()
    assert [*signatures] == ["prefill_32", "prefill_16", "decode"]
    assert {*signatures["decode"]["inputs"]} == {*signatures["prefill_16"]["inputs"]}
    assert {*signatures["decode"]["outputs"]} - {*signatures["prefill_16"]["outputs"]} == {"logits"}
    facts = unpacked_metadata(here / "unpacked")
    assert not facts.HasField("start_token")
    assert [list(t.token_ids.ids) for t in facts.stop_tokens] == [[1]]
    assert facts.max_num_tokens == 64
    assert facts.llm_model_type.WhichOneof("model_type") == "generic_model"


def unpacked_metadata(folder):
    protos = importlib.import_module("litert_lm_builder.runtime.proto.llm_metadata_pb2")
    text_format = importlib.import_module("google.protobuf.text_format")
    (file,) = folder.rglob("*etadata*.pbtext")
    return text_format.Parse(file.read_text(), protos.LlmMetadata())


def test_a_tokenizer_without_an_end_is_refused(here, builder):
    folder = here / "out" / "tokenizer"
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    form = Integers(tiny.quantized("gqa_llama3", "w8a8"))
    with pytest.raises(UserError, match="tokenizer: names no token that ends a text; expected an"):
        litertlm_package.write_package(form, folder, here / "m.litertlm", CHUNK, CONTEXT)
    assert not (here / "m.litertlm").exists()


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ("16", "context: 16 positions for 16 new tokens; expected more; raise --context or lower"),
        ("600", "600 tokens = 600 positions; expected at most the model's 512"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(refused, builder, context, message):
    args = f"export out m.litertlm --litertlm --prefill 16 --context {context}".split()
    assert message in refused(*args)


def test_a_file_that_exists_is_refused(refused, here, builder):
    (here / "m.litertlm").touch()
    assert "m.litertlm: exists" in refused("export", "out", "m.litertlm", "--litertlm")


@pytest.mark.parametrize("typed", [False, True])
def test_templates_get_text(typed):
    messages = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "3"}]
    expected = render_chat(TEMPLATE, messages, {}, "m")
    if typed:
        for message in messages:
            parts = [{"type": "text", "text": text} for text in message["content"].partition(" ")]
            message.update(content=parts)  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert render_chat(litertlm_package.PLAIN_CONTENT + TEMPLATE, messages, {}, "m") == expected


@pytest.fixture
def engine(here, builder, runtime):
    """LiteRT-LM on this CPU, with a chat template."""
    (here / "out" / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    file = here / "m.litertlm"
    form = Integers(storage.load(here / "out"))
    litertlm_package.write_package(form, here / "out/tokenizer", file, PREFILL, SLOTS)
    runtime.set_min_log_severity(runtime.LogSeverity.ERROR)
    backend = runtime.Backend.CPU(thread_count=1)
    with runtime.Engine(str(file), backend=backend, cache_dir=":nocache") as engine:
        yield engine


def ours(folder, turns):
    """What `qnpu generate` says to each list of ids, in one session."""
    out = OutputFolder.open(folder / "out")
    file = deploy.cached_file(out, deploy.CachedFile(PREFILL, SLOTS))
    backend = LiteRTBackend(file, "xnn", threads=1)
    session, tokenizer, pending = Session(backend), out.tokenizer, []
    for ids in turns:
        prompt, stops = pending + ids, tokenizer.eos_ids
        made = [*generation.generate_ids(session, prompt, Sampling(), MOST, stops)]
        pending = made[-1:]  # drawn, and not yet in the cache
        yield tokenizer.decode(made)


@pytest.mark.parametrize("prompts", [["The import"], ["A class", " defines", " it: " * 15]])
def test_the_runtime_says_the_same(here, engine, prompts):
    tokenizer = Tokenizer.load(here / "out/tokenizer")
    turns = [tokenizer.encode(p) for p in prompts]
    assert [engine.tokenize(p) for p in prompts] == turns
    said = []
    with engine.create_session(apply_prompt_template=False, max_output_tokens=MOST) as session:
        for prompt in prompts:
            session.run_prefill([prompt])
            said.append(session.run_decode().texts[0])
    # LiteRT-LM keeps to itself a character whose last bytes are still to come.
    assert [s.rstrip(REPLACEMENT) for s in said] == [
        s.rstrip(REPLACEMENT) for s in ours(here, turns)
    ]


def test_the_runtime_renders_the_same_chat(here, engine):
    messages = [{"role": "user", "content": "Hi, what is a class?"}]
    ids = Tokenizer.load(here / "out/tokenizer").chat(messages, bos=False)
    with engine.create_conversation(max_output_tokens=MOST) as chat:
        text = chat.render_message_to_string(messages[0])
        assert engine.tokenize(text) == ids
        answer = chat.send_message(messages[0])
    (said,) = ours(here, [ids])
    text = "".join(part["text"] for part in answer["content"])
    assert text.rstrip(REPLACEMENT) == said.rstrip(REPLACEMENT)
