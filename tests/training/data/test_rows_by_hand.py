"""From judged samples to training examples, written out by hand: five methods, three kinds of tokenizer.

Six samples pass through a method's labels and the datapool to the tokens, labels and weights that the
trainer sees. Every expected row is a literal: its tokens, their ids in a vocabulary defined here, and where
the learned text begins. No expected value is computed by the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import polars as pl
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.training.tiny import make_model
from textalign_dagster.methods import AltLMC, AltLMU, AltRM, Method, Quark, SteerLM
from textalign_dagster.pool.datapool import build_pool
from textalign_dagster.pool.quantiles import QuantileSettings
from textalign_dagster.settings.pool import PoolSettings
from training.data.batches import Collator
from training.data.examples import Example, encode
from training.data.special_tokens import add_special_tokens, vocabulary_rows
from training.job import Job
from training.settings import Training

# --- The samples -----------------------------------------------------------------------------------

POST = "Post one TL;DR:"
IMITATION = "feedback: Good facts. input: Post one TL;DR:"  # looks like the template, but is only a prompt
LONG = "Post" + " two" * 30 + " TL;DR:"

JUDGED = pl.DataFrame(
    [
        # sample, prompt, text, how it ended, its tokens; value, sentence, category, status, weight
        ("s1", POST, " A cat", "stop", 3, 3.0, "Good facts.", "Harmless and very helpful", "ok", 2.0),
        ("s2", POST, " A big dog", "length", 3, 1.0, "No facts.", "Harmful", "ok", 1.0),
        ("s3", POST, " A dog.", "length", 3, 2.0, "Some facts.", "Harmless and helpful", "ok", 1.0),
        ("s4", IMITATION, " Yes", "stop", 2, 0.0, "No facts.", "Harmless and not helpful", "ok", 0.5),
        ("s5", POST, " Yes", "stop", 2, None, None, None, "unparseable", 1.0),
        ("s6", LONG, " No big dog", "stop", 3, 2.5, "Good facts.", "Harmless and helpful", "ok", 1.0),
    ],
    schema=(
        *("sample_id", "prompt", "text_sampled", "finish_reason", "n_tokens"),
        *("value", "text", "label", "status", "weight"),
    ),
    orient="row",
).with_columns(prompt_id="prompt", origin=pl.lit(1))
HEX = "0" * 15  # sample ids are hexadecimal: s1 is 0…01
MAX_NEW_TOKENS = 3
MAX_LENGTH = 22

QUANTILES = QuantileSettings(per="pool")  # five samples with a value: one per quantile
METHODS: dict[str, Method] = {
    "quark": Quark(quantiles=QUANTILES),
    "alt_rm": AltRM(quantiles=QUANTILES),
    "alt_lmu": AltLMU(ask_for="Good facts."),
    "alt_lmc": AltLMC(),
    "steerlm": SteerLM(),
}

# --- The tokenizers --------------------------------------------------------------------------------
# Ġ is a space and Ċ a line break, as byte-level vocabularies spell them. Anything not listed is split
# into bytes, which come last.

# fmt: off
WORDS = [
    "Post", "ĠPost", "Ġone", "Ġtwo", "ĠTL", ";", "DR", ";DR", ":", ".", ",", "Ċ", ".ĊĊ",  # 0 to 12
    "feedback", "Ġfeedback", "Ġinput", "ĠGood", "ĠSome", "ĠNo", "Ġfacts",  # 13 to 19
    "Excellent", "Good", "Mediocre", "Bad", "Horrible",  # 20 to 24
    "Harmless", "Harmful", "Ġand", "Ġvery", "Ġhelpful", "Ġnot",  # 25 to 30
    "harmful", "helpful", ",helpful", "0", "1", "2",  # 31 to 36
    "ĠA", "Ġbig", "Ġcat", "Ġdog", "ĠYes",  # 37 to 41
]
# fmt: on
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe(vocabulary: list[str]) -> Tokenizer:
    """Byte-level BPE whose words are whole tokens."""
    rest = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in vocabulary]
    ids = {token: i for i, token in enumerate([*vocabulary, *rest])}
    built = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    built.decoder = decoders.ByteLevel()
    return built


def gpt2() -> PreTrainedTokenizerFast:
    """No BOS token; the end token follows the vocabulary; padding has its own token."""
    built = bpe(WORDS)
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    size = built.get_vocab_size()
    built.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<pad>", special=True)])
    assert built.token_to_id("<|endoftext|>") == size
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|endoftext|>", pad_token="<pad>")


def gptj() -> PreTrainedTokenizerFast:
    """Like GPT-2, with unused tokens after the end token, and no padding token."""
    built = bpe(WORDS)
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    built.add_tokens([AddedToken(f"<|extratoken_{i}|>", normalized=False) for i in range(1, 4)])
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|endoftext|>")


def llama() -> PreTrainedTokenizerFast:
    """A BOS token starts every text; it and the end token come first in the vocabulary."""
    built = bpe(["<s>", "</s>", *WORDS])
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    built.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@dataclass(frozen=True)
class Style:
    """A tokenizer, and the ids of its tokens other than `WORDS`, by hand."""

    tokenizer: PreTrainedTokenizerFast
    first: int  # the id of WORDS[0]
    end: int
    quantile_0: int  # the id of Quark's first token, once added
    pad: int

    def ids(self, tokens: str) -> list[int]:
        """`"ĠA Ġtwo*3 END"` as ids."""
        ids: list[int] = []
        for token in tokens.split():
            word, _, times = token.partition("*")
            if word in ("END", "BEGIN"):
                ids.append(self.end if word == "END" else 0)
            elif word.startswith("Q") and word[1:].isdigit():
                ids.append(self.quantile_0 + int(word[1:]))
            else:
                ids += [self.first + WORDS.index(word)] * int(times or 1)
        return ids


# 42 words, of which ; : . , 0 1 2 are single bytes (as is Ċ): 42 + 256 - 8 = 290 tokens.
STYLES = {
    "gpt2": lambda: Style(gpt2(), first=0, end=290, quantile_0=292, pad=291),
    "gptj": lambda: Style(gptj(), first=0, end=290, quantile_0=294, pad=290),
    "llama": lambda: Style(llama(), first=2, end=1, quantile_0=292, pad=1),
}

# --- Expected rows ---------------------------------------------------------------------------------
# Sample → (prompt, learned text). Rule finish_reason: s1, s4 and s6 stopped by themselves.

BYTE_LEVEL = {
    "quark": {
        "s1": ("Q0 Post Ġone ĠTL ; DR :", "ĠA Ġcat END"),
        "s2": ("Q3 Post Ġone ĠTL ; DR :", "ĠA Ġbig Ġdog"),
        "s3": ("Q2 Post Ġone ĠTL ; DR :", "ĠA Ġdog ."),
        "s4": ("Q4 feedback : ĠGood Ġfacts . Ġinput : ĠPost Ġone ĠTL ; DR :", "ĠYes END"),
        "s6": ("Q1 Ġtwo*13 ĠTL ; DR :", "ĠNo Ġbig Ġdog END"),
    },
    "alt_rm": {
        "s1": ("Excellent . Ġinput : ĠPost Ġone ĠTL ; DR :", "ĠA Ġcat END"),
        "s2": ("Bad . Ġinput : ĠPost Ġone ĠTL ; DR :", "ĠA Ġbig Ġdog"),
        "s3": ("Mediocre . Ġinput : ĠPost Ġone ĠTL ; DR :", "ĠA Ġdog ."),
        "s4": (
            "Horrible . Ġinput : Ġfeedback : ĠGood Ġfacts . Ġinput : ĠPost Ġone ĠTL ; DR :",
            "ĠYes END",
        ),
        # The space of "input: " is in the token ĠPost, which therefore stays.
        "s6": ("Good . Ġinput : ĠPost Ġtwo*9 ĠTL ; DR :", "ĠNo Ġbig Ġdog END"),
    },
    "alt_lmu": {
        "s1": ("feedback : ĠGood Ġfacts . Ġinput : ĠPost Ġone ĠTL ; DR :", "ĠA Ġcat END"),
        "s2": ("feedback : ĠNo Ġfacts . Ġinput : ĠPost Ġone ĠTL ; DR :", "ĠA Ġbig Ġdog"),
        "s3": ("feedback : ĠSome Ġfacts . Ġinput : ĠPost Ġone ĠTL ; DR :", "ĠA Ġdog ."),
        "s4": (
            "feedback : ĠNo Ġfacts . Ġinput : Ġfeedback : ĠGood Ġfacts . Ġinput : ĠPost Ġone ĠTL ; DR :",
            "ĠYes END",
        ),
        "s6": ("feedback : ĠGood Ġfacts . Ġinput : ĠPost Ġtwo*6 ĠTL ; DR :", "ĠNo Ġbig Ġdog END"),
    },
    "alt_lmc": {
        "s1": ("Harmless Ġand Ġvery Ġhelpful . Ċ Ċ Post Ġone ĠTL ; DR :", "ĠA Ġcat END"),
        "s2": ("Harmful . Ċ Ċ Post Ġone ĠTL ; DR :", "ĠA Ġbig Ġdog"),
        "s3": ("Harmless Ġand Ġhelpful . Ċ Ċ Post Ġone ĠTL ; DR :", "ĠA Ġdog ."),
        # 7 + 13 + 2 tokens: it just fits.
        "s4": (
            "Harmless Ġand Ġnot Ġhelpful . Ċ Ċ feedback : ĠGood Ġfacts . Ġinput : ĠPost Ġone ĠTL ; DR :",
            "ĠYes END",
        ),
        "s6": ("Harmless Ġand Ġhelpful . Ċ Ċ Ġtwo*8 ĠTL ; DR :", "ĠNo Ġbig Ġdog END"),
    },
    "steerlm": {
        "s1": ("harmful : 0 , helpful : 2 . Ċ Ċ Post Ġone ĠTL ; DR :", "ĠA Ġcat END"),
        "s2": ("harmful : 1 , helpful : 0 . Ċ Ċ Post Ġone ĠTL ; DR :", "ĠA Ġbig Ġdog"),
        "s3": ("harmful : 0 , helpful : 1 . Ċ Ċ Post Ġone ĠTL ; DR :", "ĠA Ġdog ."),
        # 10 + 13 + 2 tokens: the first three of the prompt are dropped.
        "s4": (
            "harmful : 0 , helpful : 0 . Ċ Ċ Ġfacts . Ġinput : ĠPost Ġone ĠTL ; DR :",
            "ĠYes END",
        ),
        "s6": ("harmful : 0 , helpful : 1 . Ċ Ċ Ġtwo*4 ĠTL ; DR :", "ĠNo Ġbig Ġdog END"),
    },
}
WITH_BEGIN = {
    "quark": {
        "s1": ("BEGIN Q0 Post Ġone ĠTL ;DR :", "ĠA Ġcat END"),
        "s2": ("BEGIN Q3 Post Ġone ĠTL ;DR :", "ĠA Ġbig Ġdog"),
        "s3": ("BEGIN Q2 Post Ġone ĠTL ;DR :", "ĠA Ġdog ."),
        "s4": ("BEGIN Q4 feedback : ĠGood Ġfacts . Ġinput : ĠPost Ġone ĠTL ;DR :", "ĠYes END"),
        "s6": ("BEGIN Q1 Ġtwo*13 ĠTL ;DR :", "ĠNo Ġbig Ġdog END"),
    },
    "alt_rm": {
        "s1": ("BEGIN Excellent . Ġinput : ĠPost Ġone ĠTL ;DR :", "ĠA Ġcat END"),
        "s2": ("BEGIN Bad . Ġinput : ĠPost Ġone ĠTL ;DR :", "ĠA Ġbig Ġdog"),
        "s3": ("BEGIN Mediocre . Ġinput : ĠPost Ġone ĠTL ;DR :", "ĠA Ġdog ."),
        "s4": (
            "BEGIN Horrible . Ġinput : Ġfeedback : ĠGood Ġfacts . Ġinput : ĠPost Ġone ĠTL ;DR :",
            "ĠYes END",
        ),
        "s6": ("BEGIN Good . Ġinput : ĠPost Ġtwo*9 ĠTL ;DR :", "ĠNo Ġbig Ġdog END"),
    },
    "alt_lmu": {
        "s1": ("BEGIN feedback : ĠGood Ġfacts . Ġinput : ĠPost Ġone ĠTL ;DR :", "ĠA Ġcat END"),
        "s2": ("BEGIN feedback : ĠNo Ġfacts . Ġinput : ĠPost Ġone ĠTL ;DR :", "ĠA Ġbig Ġdog"),
        "s3": ("BEGIN feedback : ĠSome Ġfacts . Ġinput : ĠPost Ġone ĠTL ;DR :", "ĠA Ġdog ."),
        "s4": (
            "BEGIN feedback : ĠNo Ġfacts . Ġinput : Ġfeedback : ĠGood Ġfacts . Ġinput : ĠPost Ġone ĠTL ;DR :",
            "ĠYes END",
        ),
        "s6": ("BEGIN feedback : ĠGood Ġfacts . Ġinput : ĠPost Ġtwo*6 ĠTL ;DR :", "ĠNo Ġbig Ġdog END"),
    },
    "alt_lmc": {
        "s1": ("BEGIN Harmless Ġand Ġvery Ġhelpful .ĊĊ Post Ġone ĠTL ;DR :", "ĠA Ġcat END"),
        "s2": ("BEGIN Harmful .ĊĊ Post Ġone ĠTL ;DR :", "ĠA Ġbig Ġdog"),
        "s3": ("BEGIN Harmless Ġand Ġhelpful .ĊĊ Post Ġone ĠTL ;DR :", "ĠA Ġdog ."),
        "s4": (
            "BEGIN Harmless Ġand Ġnot Ġhelpful .ĊĊ feedback : ĠGood Ġfacts . Ġinput : ĠPost Ġone ĠTL ;DR :",
            "ĠYes END",
        ),
        "s6": ("BEGIN Harmless Ġand Ġhelpful .ĊĊ Ġtwo*10 ĠTL ;DR :", "ĠNo Ġbig Ġdog END"),
    },
    "steerlm": {
        "s1": ("BEGIN harmful : 0 ,helpful : 2 .ĊĊ Post Ġone ĠTL ;DR :", "ĠA Ġcat END"),
        "s2": ("BEGIN harmful : 1 ,helpful : 0 .ĊĊ Post Ġone ĠTL ;DR :", "ĠA Ġbig Ġdog"),
        "s3": ("BEGIN harmful : 0 ,helpful : 1 .ĊĊ Post Ġone ĠTL ;DR :", "ĠA Ġdog ."),
        "s4": (
            "BEGIN harmful : 0 ,helpful : 0 .ĊĊ feedback : ĠGood Ġfacts . Ġinput : ĠPost Ġone ĠTL ;DR :",
            "ĠYes END",
        ),
        "s6": ("BEGIN harmful : 0 ,helpful : 1 .ĊĊ Ġtwo*7 ĠTL ;DR :", "ĠNo Ġbig Ġdog END"),
    },
}
WEIGHTS = {"s1": 2.0, "s2": 1.0, "s3": 1.0, "s4": 0.5, "s6": 1.0}

# Rule legacy: no end token if a text has exactly 3 tokens and does not end in . ? or !
# So s3 gets one (it ends in a full stop), and s6 none, which leaves room for one more token of its prompt.
LEGACY_TEXTS = {
    "s1": "ĠA Ġcat END",
    "s2": "ĠA Ġbig Ġdog",
    "s3": "ĠA Ġdog . END",
    "s4": "ĠYes END",
    "s6": "ĠNo Ġbig Ġdog",
}
LEGACY_LONG = {
    ("quark", "gpt2"): "Q1 Ġtwo*14 ĠTL ; DR :",
    ("alt_rm", "gpt2"): "Good . Ġinput : ĠPost Ġtwo*10 ĠTL ; DR :",
    ("alt_lmu", "gpt2"): "feedback : ĠGood Ġfacts . Ġinput : ĠPost Ġtwo*7 ĠTL ; DR :",
    ("alt_lmc", "gpt2"): "Harmless Ġand Ġhelpful . Ċ Ċ Ġtwo*9 ĠTL ; DR :",
    ("steerlm", "gpt2"): "harmful : 0 , helpful : 1 . Ċ Ċ Ġtwo*5 ĠTL ; DR :",
    ("quark", "llama"): "BEGIN Q1 Ġtwo*14 ĠTL ;DR :",
    ("alt_rm", "llama"): "BEGIN Good . Ġinput : ĠPost Ġtwo*10 ĠTL ;DR :",
    ("alt_lmu", "llama"): "BEGIN feedback : ĠGood Ġfacts . Ġinput : ĠPost Ġtwo*7 ĠTL ;DR :",
    ("alt_lmc", "llama"): "BEGIN Harmless Ġand Ġhelpful .ĊĊ Ġtwo*11 ĠTL ;DR :",
    ("steerlm", "llama"): "BEGIN harmful : 0 ,helpful : 1 .ĊĊ Ġtwo*8 ĠTL ;DR :",
}


def rows_of(method: Method) -> pl.DataFrame:
    """The trainer's rows, computed from the judges' feedback."""
    judged = JUDGED.with_columns(pl.col("sample_id").str.replace("s", HEX))
    rows = judged if method.ranking else method.label(judged)
    pool = build_pool(
        rows,
        PoolSettings(per="pool"),
        current=1,
        labels=method.buckets,
        seed=0,
        pool_hash="by hand",
        sampling_limit=MAX_NEW_TOKENS,
        quantiles=method.ranking,
        conditions={bucket: bucket for bucket in method.buckets} if method.ranking else None,
    )
    texts = JUDGED.select("sample_id", "prompt", "finish_reason", text="text_sampled")
    named = pool.rows.filter("drawn").with_columns(pl.col("sample_id").str.replace(HEX, "s"))
    return named.join(texts, on="sample_id").sort("sample_id")


def examples_of(style: Style, method: Method, eos_rule: str = "finish_reason") -> dict[str, Example]:
    """Sample → example, with Quark's tokens added to a model as the trainer does."""
    if method.special_tokens:
        model = make_model(len(style.tokenizer))
        added = add_special_tokens(model, style.tokenizer, list(method.special_tokens), "mean_std", seed=0)
        assert added == [style.quantile_0 + i for i in range(5)]
    training = Training.model_validate({"eos_rule": eos_rule, "max_length": MAX_LENGTH})
    job = Job(
        rows="rows", policy="policy", out="out", template=method.template,
        max_new_tokens=MAX_NEW_TOKENS, training=training,
    )  # fmt: skip
    rows = rows_of(method)
    return dict(zip(rows["sample_id"], encode(rows, style.tokenizer, job), strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tokenizer", STYLES)
def test_prompts_and_learned_texts(name: str, tokenizer: str) -> None:
    style = STYLES[tokenizer]()
    expected = (WITH_BEGIN if tokenizer == "llama" else BYTE_LEVEL)[name]
    examples = examples_of(style, METHODS[name])
    assert list(examples) == ["s1", "s2", "s3", "s4", "s6"]  # unparseable feedback is never trained on
    for sample, (prompt, text) in expected.items():
        assert examples[sample].prompt == style.ids(prompt), sample
        assert examples[sample].text == style.ids(text), sample
    assert {sample: example.weight for sample, example in examples.items()} == WEIGHTS


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tokenizer", STYLES)
def test_published_end_token_rule(name: str, tokenizer: str) -> None:
    style = STYLES[tokenizer]()
    kind = "llama" if tokenizer == "llama" else "gpt2"
    expected = (WITH_BEGIN if tokenizer == "llama" else BYTE_LEVEL)[name]
    examples = examples_of(style, METHODS[name], "legacy")
    for sample, text in LEGACY_TEXTS.items():
        assert examples[sample].text == style.ids(text), sample
        prompt = LEGACY_LONG[name, kind] if sample == "s6" else expected[sample][0]
        assert examples[sample].prompt == style.ids(prompt), sample


def test_some_rows_in_plain_numbers() -> None:
    """Without the notation above: token ids as literals."""
    examples = examples_of(STYLES["gpt2"](), METHODS["alt_lmu"])
    assert examples["s1"] == Example([13, 8, 16, 19, 9, 15, 8, 1, 2, 4, 5, 6, 8], [37, 39, 290], 2.0)
    assert examples["s4"].prompt == [13, 8, 18, 19, 9, 15, 8, 14, 8, 16, 19, 9, 15, 8, 1, 2, 4, 5, 6, 8]
    examples = examples_of(STYLES["gptj"](), METHODS["quark"])
    assert examples["s1"] == Example([294, 0, 2, 4, 5, 6, 8], [37, 39, 290], 2.0)
    assert examples["s6"] == Example([295, *[3] * 13, 4, 5, 6, 8], [18, 38, 40, 290], 1.0)
    examples = examples_of(STYLES["llama"](), METHODS["steerlm"])
    assert examples["s2"] == Example([0, 33, 10, 37, 35, 10, 36, 14, 2, 4, 6, 9, 10], [39, 40, 42], 1.0)
    examples = examples_of(STYLES["llama"](), METHODS["alt_rm"])
    assert examples["s3"] == Example([0, 24, 11, 17, 10, 3, 4, 6, 9, 10], [39, 42, 11], 1.0)


def test_padding_with_the_end_token_is_neither_attended_nor_learned() -> None:
    """GPT-J pads with its end token: the real one is learned, the padding is not."""
    style = STYLES["gptj"]()
    examples = examples_of(style, METHODS["quark"])
    batch = Collator(style.pad)([examples["s1"], examples["s2"], replace(examples["s4"], weight=0.0)])
    assert batch["input_ids"].tolist() == [
        [294, 0, 2, 4, 5, 6, 8, 37, 39, 290, 290, 290, 290, 290, 290, 290],
        [297, 0, 2, 4, 5, 6, 8, 37, 38, 40, 290, 290, 290, 290, 290, 290],
        [298, 13, 8, 16, 19, 9, 15, 8, 1, 2, 4, 5, 6, 8, 41, 290],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 10 + [0] * 6, [1] * 10 + [0] * 6, [1] * 16]
    ignored = -100
    assert batch["labels"].tolist() == [
        [ignored] * 7 + [37, 39, 290] + [ignored] * 6,
        [ignored] * 7 + [37, 38, 40] + [ignored] * 6,
        [ignored] * 14 + [41, 290],
    ]
    assert batch["weights"].tolist() == [2.0, 1.0, 0.0]


def test_new_tokens_use_the_padding_rows_of_the_vocabulary() -> None:
    style = STYLES["gptj"]()
    model = make_model(304)  # 294 tokens, and 10 rows that pad the vocabulary
    tokens = list(METHODS["quark"].special_tokens)
    assert add_special_tokens(model, style.tokenizer, tokens, "eos", seed=0) == [294, 295, 296, 297, 298]
    assert vocabulary_rows(model) == 304
