import logging
import math
import stat

import numpy as np
import pytest

from blip_pipelines.evaluation import captioning
from blip_pipelines.evaluation.captioning import bleu, cider, rouge_l, score_captions, tokenise

words = str.split

WORDS = ["a", "red", "cat", "dog", "on", "mat", "with", "dark", "skin", "tone"]


def random_captions(count, seed):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(1, 9))) for _ in range(count)]


def plain_cider(candidates, references):
    """CIDEr-D as published (Vedantam et al. 2015, equation 4), vectors over an explicit vocabulary, one n at a time."""
    total = np.zeros(len(candidates))
    for n in range(1, 5):

        def grams(caption, n=n):
            tokens = caption.split()
            return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

        everything = [*candidates, *(caption for captions in references for caption in captions)]
        vocabulary = sorted({gram for caption in everything for gram in grams(caption)})
        idf = np.zeros(len(vocabulary))
        for index, gram in enumerate(vocabulary):
            documents = sum(any(gram in grams(caption) for caption in captions) for captions in references)
            idf[index] = math.log(len(references) / max(1, documents))

        def vector(caption, vocabulary=vocabulary, idf=idf, grams=grams):
            return np.array([grams(caption).count(gram) for gram in vocabulary], dtype=np.float64) * idf

        for i, (candidate, captions) in enumerate(zip(candidates, references, strict=True)):
            for caption in captions:
                c, s = vector(candidate), vector(caption)
                if np.linalg.norm(c) and np.linalg.norm(s):
                    bigrams = max(0, len(candidate.split()) - 1) - max(0, len(caption.split()) - 1)
                    cosine = np.minimum(c, s) @ s / (np.linalg.norm(c) * np.linalg.norm(s))
                    total[i] += 10 / 4 / len(captions) * cosine * math.exp(-(bigrams**2) / (2 * 6.0**2))
    return total


def test_cider_equals_the_published_formula():
    candidates = random_captions(12, 0)
    references = [random_captions(1 + i % 3, 10 + i) for i in range(12)]
    references[3][0] = candidates[3]
    found = cider([c.split() for c in candidates], [[r.split() for r in captions] for captions in references])
    np.testing.assert_allclose(found, plain_cider(candidates, references), rtol=0, atol=1e-12)
    assert (found > 0.1).sum() > 6, "the case must have overlap to measure"


def test_cider_of_a_copy_is_10_when_its_words_are_its_own():
    captions = ["one two three four", "five six seven eight", "nine ten eleven twelve"]
    scores = score_captions(captions, [[caption] for caption in captions])
    np.testing.assert_allclose(scores.samples["cider"], 10, atol=1e-12)
    assert scores.corpus["cider"] == pytest.approx(10)


def test_cider_worked_by_hand():
    # Two samples: "red" and "red cat" are in one reference each (idf ln 2), "cat" in both (idf 0).
    # Unigrams: (red) against (red): 1. Bigram: 1. No trigrams: 0. Mean over 4 of 10: 5; equal length: no damping.
    # Second: "cat" alone has idf 0, so 0.
    found = cider([["red", "cat"], ["cat"]], [[["red", "cat"]], [["blue", "cat"]]])
    np.testing.assert_allclose(found, [5, 0], atol=1e-12)
    # "red red" is clipped to one "red": 1 * ln2 * ln2 / (2 ln2 * ln2) = 1/2 for unigrams, no bigram in common.
    found = cider([["red", "red"], ["cat"]], [[["red", "cat"]], [["blue", "cat"]]])
    np.testing.assert_allclose(found, [10 / 4 / 2, 0], atol=1e-12)


def test_bleu_worked_by_hand():
    # 6 of 7 candidate unigrams are "the": clipped to the 2 that one reference has; no bigram matches.
    corpus, samples = bleu([words("the the the the the the the")], [[words("the cat is on the mat")]])
    np.testing.assert_allclose(samples[0, 0], 2 / 7, rtol=1e-6)
    assert samples[0, 1] < 1e-3
    np.testing.assert_allclose(corpus, samples[0])
    # Brevity: 4 of 4 match, the closest reference has 5 words, not the one with 9.
    corpus, _ = bleu([words("a b c d")], [[words("a b c d e"), words("a b c d e f g h i")]])
    np.testing.assert_allclose(corpus, math.exp(1 - 5 / 4), rtol=1e-6)
    # The data set's BLEU is of summed counts, not a mean: (4 + 0) / (4 + 4) unigrams.
    corpus, samples = bleu([words("a b c d"), words("e f g h")], [[words("a b c d")], [words("i j k l")]])
    np.testing.assert_allclose([corpus[0], samples[:, 0].mean()], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(corpus[3], (4 / 8 * 3 / 6 * 2 / 4 * 1 / 2) ** (1 / 4), rtol=1e-6)


def test_rouge_worked_by_hand():
    # Common subsequence "the cat mat": precision 3/4; recall 3/6 of the first reference, 2/2 of the second.
    found = rouge_l([words("the cat sat mat")], [[words("the cat is on the mat"), words("the cat")]])
    precision, recall, beta = 3 / 4, 1.0, 1.2
    np.testing.assert_allclose(found, (1 + beta**2) * precision * recall / (recall + beta**2 * precision))


def test_copies_score_full_marks_and_strangers_none():
    references = [["a red cat on a mat", "the cat is here"], ["two dogs run far away"], ["one boat at the sea"]]
    copies = score_captions([captions[-1] for captions in references], references)
    for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"):
        assert copies.corpus[name] == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(copies.samples[name], 1, atol=1e-6)
    strangers = score_captions(["x y z w v"] * 3, references)
    assert all(value < 1e-6 for value in strangers.corpus.values())


def test_an_empty_caption_scores_zero_and_breaks_nothing():
    scores = score_captions(["", "a dog"], [["a cat"], ["a dog"]])
    assert scores.samples["cider"][0] == scores.samples["rouge_l"][0] == 0
    assert all(np.isfinite(values).all() for values in scores.samples.values())


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("It's a man's e-mail, isn't it?", "it 's a man 's e-mail is n't it"),
        ("They can't; gonna cannot!", "they ca n't gon na can not"),
        ("Mr. Smith's U.S. flag... 3.5 % of $10", "mr. smith 's u.s. flag 3.5 % of $ 10"),
        ('a "red" ‘blue’ “green” -- dash – em — dash', "a red blue green dash em dash"),
        ("a man: medium-light skin tone", "a man medium-light skin tone"),
        ("o'clock at 3:30, 12,000 AT&T people", "o'clock at 3:30 12,000 at&t people"),
        ("the flag of côte d’ivoire", "the flag of côte d’ivoire"),
        ("a (red) ball", "a -lrb- red -rrb- ball"),
        ("keycap #, *, größe 日本", "keycap # * größe 日本"),
        (" \n ", ""),
    ],
)
def test_captions_are_tokenised_as_the_coco_evaluation_does(caption, tokens):
    assert tokenise(caption) == tokens.split()  # expected values: the Stanford tokeniser with the COCO punctuation list


def test_a_sample_that_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match="sample 0 has no reference"):
        score_captions(["a", "b"], [[], ["b"]])
    with pytest.raises(ValueError, match="2 captions for 1 samples"):
        score_captions(["a", "b"], [["a"]])


def fake_java(folder, monkeypatch, script):
    program = folder / "bin" / "java"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    for jar in (captioning.METEOR_JAR, captioning.SPICE_JAR):
        (folder / jar).touch()


def test_java_metrics_are_absent_with_a_line_where_they_cannot_run(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        scores = score_captions(["a cat"], [["a cat"]], jars=tmp_path)
    assert not {"meteor", "spice"} & (scores.corpus.keys() | scores.samples.keys())
    assert "METEOR left out" in caplog.text
    assert "SPICE left out" in caplog.text


def test_java_metrics_that_fail_are_absent_not_zero(tmp_path, monkeypatch, caplog):
    fake_java(tmp_path, monkeypatch, "echo 'no models' >&2; exit 1")
    scores = score_captions(["a cat"], [["a cat"]], jars=tmp_path)
    assert not {"meteor", "spice"} & scores.corpus.keys()
    assert "no models" in caplog.text


def test_java_metrics_speak_the_protocols_of_their_programs(tmp_path, monkeypatch):
    meteor = r"""while read -r line; do case "$line" in
SCORE*) echo "$line" >> $0.log; echo stats;; *) printf "0.25\n0.75\n0.5\n";; esac; done"""
    spice = """while [ "$1" != -out ]; do shift; done
echo '[{"image_id": 1, "scores": {"All": {"f": 0.5}}}, {"image_id": 0, "scores": {"All": {"f": 1.0}}}]' > $2"""
    fake_java(tmp_path, monkeypatch, f'case "$*" in *meteor*) {meteor};; *) {spice};; esac')
    scores = score_captions(["a cat", "a dog"], [["the cat", "cats"], ["it's a dog"]], jars=tmp_path)
    assert (scores.corpus["meteor"], scores.corpus["spice"]) == (0.5, 0.75)
    np.testing.assert_allclose(scores.samples["meteor"], [0.25, 0.75])
    np.testing.assert_allclose(scores.samples["spice"], [1.0, 0.5])
    asked = (tmp_path / "bin" / "java.log").read_text().splitlines()
    assert asked == ["SCORE ||| the cat ||| cats ||| a cat", "SCORE ||| it 's a dog ||| a dog"]
