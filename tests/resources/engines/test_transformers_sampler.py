"""The embedded engine as its callers see it: real worker processes, tiny random models."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from resources.engines.sampler import Completion, Decoding, Request, Sampler, SamplerError
from resources.engines.transformers.sampler import TransformersSampler
from resources.workers import channel
from tests.resources.engines import tiny_models
from textalign_dagster import PROJECT, tokenisation

pytestmark = pytest.mark.usefixtures("quick")
ROOT = PROJECT
REQUESTS = [
    Request("def add(a, b):", (1, 2, 3)),
    Request("for name in", (4,)),
    Request("class Thing:\n    value", (5, 6, 7, 8, 9)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_models.save(root / kind, kind) for kind in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def sampler() -> Iterator[Sampler]:
    with TransformersSampler(threads=1, batch_size=4) as opened:
        yield opened


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A model folder that a test may break."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "broken"))


def test_two_processes_give_the_same_completions(folders: dict[str, Path], sampler: Sampler) -> None:
    decoding = Decoding(temperature=1.0, top_p=0.95, max_new_tokens=12)
    ours = {kind: sampler.generate(folder, REQUESTS, decoding) for kind, folder in folders.items()}
    with TransformersSampler(threads=1, batch_size=4) as other:
        theirs = {kind: other.generate(folders[kind], REQUESTS, decoding) for kind in ("gpt2", "llama")}
    assert ours == theirs  # also with the models loaded in another order
    assert ours["llama"] != ours["gpt2"]
    assert [len(row) for row in ours["llama"]] == [3, 1, 5]
    assert len({completion.text for row in ours["llama"] for completion in row}) == 9


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_matches_generate_and_text_continues_the_prompt(
    folders: dict[str, Path], sampler: Sampler, kind: str
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders[kind]), tiny_models.tokenizer()
    rows = sampler.generate(folders[kind], REQUESTS, Decoding(temperature=0, max_new_tokens=16))
    for request, row in zip(REQUESTS, rows, strict=True):
        assert len({(completion.text, completion.n_tokens) for completion in row}) == 1  # for every seed
        ids = torch.tensor([tokenizer(request.prompt)["input_ids"]])
        config = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=0, pad_token_id=1,
                                 suppress_tokens=list(range(len(tokenizer), 304)))  # fmt: skip
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        whole = tokenizer.decode(out[0], skip_special_tokens=True)
        assert whole == request.prompt + row[0].text
        assert row[0].n_tokens == out.shape[1] - ids.shape[1]


def test_end_tokens_lengths_and_banned_tokens(folders: dict[str, Path], sampler: Sampler) -> None:
    request = [Request("def", tuple(range(60)))]
    free = sampler.generate(folders["llama"], request, Decoding(temperature=5.0, max_new_tokens=40))[0]
    assert {completion.finish_reason for completion in free} == {"stop", "length"}
    for completion in free:
        assert (
            completion.n_tokens == 40 if completion.finish_reason == "length" else completion.n_tokens <= 40
        )
        assert "<|end|>" not in completion.text
    fixed = Decoding(temperature=5.0, max_new_tokens=20, ignore_eos=True, banned_tokens=("(", "\n"))
    for completion in sampler.generate(folders["llama"], request, fixed)[0]:
        assert (completion.finish_reason, completion.n_tokens) == ("length", 20)
        assert not completion.text.startswith(("(", "\n"))


def test_progress_reaches_the_total(folders: dict[str, Path], sampler: Sampler) -> None:
    seen: list[tuple[int, int]] = []
    sampler.generate(folders["llama"], REQUESTS, Decoding(1.0, max_new_tokens=4),
                     lambda done, total: seen.append((done, total)))  # fmt: skip
    assert seen[-1] == (9, 9)
    assert seen == sorted(seen)


def test_logprobs_cover_only_the_text(folders: dict[str, Path], sampler: Sampler) -> None:
    tokenizer = tiny_models.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    pairs = [("def add(a, b):", "\n    return a + b"), ("for", " name in names:\n" * 3), ("x", ""),
             ("class Thing:\n", "<|end|>")]  # fmt: skip
    scored = sampler.logprobs(folders["gpt2"], pairs * 3)
    assert [t for t, _ in scored[:4]] == pytest.approx([t for t, _ in scored[4:8]], abs=1e-4)
    assert scored[2] == (0.0, 0)
    for (prompt, text), (total, count) in zip(pairs, scored, strict=False):
        start = tokenizer(prompt)["input_ids"]
        ids = tokenizer(text, split_special_tokens=True)["input_ids"] if text else []
        with torch.inference_mode():
            logits = model(torch.tensor([start + ids])).logits[0].log_softmax(-1)
        terms = [logits[len(start) + i - 1, token].item() for i, token in enumerate(ids)]
        assert (total, count) == (pytest.approx(sum(terms), abs=1e-3), len(ids))
    assert scored[3][1] > 1  # a text that spells the end token is plain text, not an end


def test_a_rewritten_folder_is_loaded_again(copy: Path, sampler: Sampler) -> None:
    decoding = Decoding(temperature=0, max_new_tokens=8)
    before = sampler.generate(copy, REQUESTS, decoding)
    tiny_models.save(copy, "llama", seed=1)
    assert sampler.generate(copy, REQUESTS, decoding) != before


def test_prompts_that_do_not_fit_are_named(folders: dict[str, Path], sampler: Sampler) -> None:
    long = [*REQUESTS, Request("a b c d e " * 5, (1,))]
    tokens = len(tiny_models.tokenizer()(long[3].prompt)["input_ids"])
    assert 30 < tokens < 64
    with pytest.raises(SamplerError) as caught:
        sampler.generate(folders["gpt2"], long, Decoding(1.0, max_new_tokens=40))
    message = str(caught.value)
    assert "prompt 3 ('a b c d e" in message and f"has {tokens} tokens and 40 more" in message
    assert "holds 64 tokens" in message and f"lower max_new_tokens to {64 - tokens}" in message
    with pytest.raises(SamplerError, match=r"prompt 0 has an empty prompt.*at least one character"):
        sampler.generate(folders["gpt2"], [Request("", (1,))], Decoding(1.0, max_new_tokens=4))
    with pytest.raises(SamplerError, match=r"pair 1 \('a'\).*shorten the prompt or the text"):
        sampler.logprobs(folders["gpt2"], [("a", "b"), ("a", "b c " * 50)])
    with pytest.raises(SamplerError, match=r"'def add\(' is \d+ tokens"):
        sampler.generate(folders["gpt2"], REQUESTS,
                         Decoding(1.0, max_new_tokens=4, banned_tokens=("def add(",)))  # fmt: skip
    assert sampler.generate(folders["gpt2"], REQUESTS, Decoding(1.0, max_new_tokens=4))


def test_unreadable_models_are_refused(copy: Path, sampler: Sampler) -> None:
    decoding = Decoding(1.0, max_new_tokens=4)
    with pytest.raises(SamplerError, match="nowhere is not a folder"):
        sampler.generate(copy / "nowhere", REQUESTS, decoding)
    weights = load_file(copy / "model.safetensors")

    for broken, complaint in [
        ({k: v for k, v in weights.items() if "q_proj" not in k}, "lacks 2 weights.*be random"),
        ({**weights, "model.norm.weight": weights["model.norm.weight"] * torch.nan}, "not finite"),
    ]:
        save_file(broken, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SamplerError, match=complaint):
            sampler.generate(copy, REQUESTS, decoding)
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(SamplerError, match="broken cannot be loaded as a causal language model"):
        sampler.generate(copy, REQUESTS, decoding)
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")  # a pickle
    with pytest.raises(SamplerError, match=r"broken cannot be loaded.*\*\.safetensors"):
        sampler.generate(copy, REQUESTS, decoding)


def test_a_tokenizer_larger_than_the_model_is_refused(copy: Path, sampler: Sampler) -> None:
    larger = tiny_models.tokenizer()
    larger.add_tokens([f"<{i}>" for i in range(9)])
    larger.save_pretrained(copy)
    with pytest.raises(SamplerError, match=r"tokenizer has 3.. tokens, the model 304 embeddings"):
        sampler.generate(copy, REQUESTS, Decoding(1.0, max_new_tokens=4))


def test_a_killed_worker_is_reported_and_replaced(folders: dict[str, Path]) -> None:
    decoding = Decoding(1.0, max_new_tokens=40)

    def kill(done: int, total: int) -> None:
        assert sampler.channels[0].worker is not None
        os.kill(sampler.channels[0].worker.process.pid, signal.SIGKILL)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    many = [Request("def", tuple(range(200)))]
    with TransformersSampler(threads=1, batch_size=4) as sampler:
        with pytest.raises(SamplerError, match="killed by SIGKILL"):
            sampler.generate(folders["llama"], many, decoding, kill)
        assert sampler.generate(folders["llama"], REQUESTS, decoding)
        worker = sampler.channels[0].worker
        assert worker is not None
        with pytest.raises(KeyboardInterrupt):
            sampler.generate(folders["llama"], many, decoding, interrupt)
        assert worker.process.poll() == -signal.SIGKILL  # it does not continue computing
    assert sampler.channels[0].worker is None


def test_a_missing_device_is_reported(folders: dict[str, Path]) -> None:
    with (
        TransformersSampler(device="cuda:99", threads=1) as sampler,
        pytest.raises(SamplerError, match=r"device 'cuda:99' cannot be used.*auto or cpu"),
    ):
        sampler.generate(folders["llama"], REQUESTS, Decoding(1.0, max_new_tokens=4))


def test_a_worker_that_cannot_start_shows_why(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(channel, "subprocess", subprocess)  # not forked
    sampler = TransformersSampler()
    with pytest.raises(SamplerError, match=r"exit code 1; its last output:(.|\n)*no torch today"):
        sampler.generate(folders["llama"], REQUESTS, Decoding(1.0, max_new_tokens=4))


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux only")
def test_the_worker_dies_with_its_parent(folders: dict[str, Path]) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from resources.engines.sampler import *; from resources.engines.transformers.sampler import *\n"
        "s = TransformersSampler(threads=1)\n"
        "def show(done, total): print(s.channels[0].worker.process.pid, flush=True)\n"
        "s.generate(Path(sys.argv[1]), [Request('def', tuple(range(200000)))],\n"
        "           Decoding(1.0, max_new_tokens=40), show)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(folders["llama"])], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    handle = os.pidfd_open(worker)
    assert os.getpgid(worker) == worker  # its own process group
    parent.kill()
    gone, _, _ = select.select([handle], [], [], 20)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    os.close(handle)
    assert gone


def test_library_output_stays_out_of_the_channel() -> None:
    program = (
        "import os; from resources.workers.serving import protocol\n"
        "calls, send = protocol(); print('noise', flush=True); os.system('echo noise; cat')\n"
        "send({'result': calls.get()}); calls.get()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, encoding="utf-8", **pipes) as worker:
        assert worker.stdin and worker.stdout and worker.stderr
        worker.stdin.write('{"op": "ü"}\n')
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline()) == {"result": {"op": "ü"}}
        worker.stdin.close()
        assert worker.stderr.read().count("noise") == 2
        assert worker.wait() == 0


def test_the_parent_process_does_not_import_torch() -> None:
    program = (
        "import sys; from resources.engines.transformers.sampler import TransformersSampler as T\n"
        "print(T().engine_version); sys.exit(not {'torch', 'transformers'}.isdisjoint(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"torch-{torch.__version__}" in done.stdout and "float32" in done.stdout


def test_leading_spaces_survive_sentencepiece_decoding() -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    bpe.train_from_iterator(["a b c abc cab " * 9], trainers.BpeTrainer(vocab_size=40))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    ids = tokenizer("abc cab", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "abc cab"  # the leading space is lost
    assert tokenisation.decode(tokenizer, [ids, []]) == [" abc cab", ""]
    assert tokenisation.decode(tiny_models.tokenizer(), [[*b""], []]) == ["", ""]


def test_begin_and_end_tokens() -> None:
    tokenizer = tiny_models.tokenizer()
    plain = tokenisation.encode_prompts(tokenizer, ["def", ""])
    assert plain == [tokenizer("def")["input_ids"], []]
    from tokenizers.processors import TemplateProcessing

    best = tokenizer.convert_tokens_to_ids("<|best|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|best|> $A <|end|>", special_tokens=[("<|best|>", best), ("<|end|>", 0)]
    )
    assert tokenisation.encode_prompts(tokenizer, ["def", "", "<|best|>def"]) == [
        [best, *plain[0]], [best], [best, *plain[0]],
    ]  # fmt: skip
    word = tokenizer.convert_tokens_to_ids("a")
    ends = tokenisation.end_ids(tokenizer, GenerationConfig(eos_token_id=[0, best, word]))
    assert ends == (0, best)  # an ordinary word is not an end, whatever the model's defaults say


@pytest.mark.parametrize(("field", "value"), [
    ("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1), ("top_k", -1),
    ("max_new_tokens", 0), ("min_new_tokens", 99),
])  # fmt: skip
def test_errors_of_settings_name_their_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Decoding(**{"temperature": 1.0, "max_new_tokens": 8, field: value})


def test_invalid_seeds_are_refused() -> None:
    for seeds in ((), (-1,), (2**64,)):
        with pytest.raises(ValueError, match="seed"):
            Request("a", seeds)
    assert Completion("", 1, "stop", -0.5) == Completion("", 1, "stop", -0.5)
