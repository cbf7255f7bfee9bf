"""Caption metrics in plain Python: CIDEr-D, BLEU-1 to -4, ROUGE-L, each over the data set and per sample.

The figures are those of the COCO caption evaluation (constants, closest reference length, the n-gram counts that
stand for length), so that published numbers compare: the papers' CIDEr of 129.7 is 1.297 here. The price is a
tokeniser that follows the Stanford one for what occurs in captions, not for every text. METEOR and SPICE exist as
Java programs only; they run where Java and their jars are, and are absent, never zero, where not.

CIDEr-D: Vedantam et al. 2015, section 4; BLEU: Papineni et al. 2002; ROUGE-L: Lin 2004.
"""

import json
import logging
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

Tokens = list[str]
Grams = Counter[tuple[str, ...]]

ORDERS = 4  # n-grams of 1 to 4 tokens
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2
METEOR_JAR, SPICE_JAR = "meteor-1.5.jar", "spice-1.0.jar"

_CONTRACTIONS = re.compile(
    r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b|\b(can)(?=not\b)|\b(gon|wan)(?=na\b)|\b(lem|gim)(?=me\b)"
)
_TOKEN = re.compile(
    r"""n't\b | '(?:s|m|d|re|ve|ll)\b          # what a contraction leaves
    | (?:[^\W\d_]\.){2,}                       # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\.       # titles keep their period
    | \d+(?:[.,:/]\d+)+(?![\w-])               # 3.5, 12,000, 3:30, 1/2
    | \w+(?:[-.'’&/]\w+)*                      # e-mail, o'clock, d’ivoire
    | [^\w\s]                                  # a symbol by itself
    """,
    re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PUNCTUATION = frozenset(".,;:!?-–—…'‘’`\"“”")


def tokenise(caption: str) -> Tokens:
    """Lower-case tokens of a caption without its punctuation, as the COCO evaluation sees it.

    Brackets stay, under the names the Stanford tokeniser gives them: the COCO evaluation means to drop them, but
    its list spells them in capitals after lower-casing, and published figures include them.
    """
    spaced = _CONTRACTIONS.sub(
        lambda found: f" {found[1]}" if found[1] else f"{found[2] or found[3] or found[4]} ", caption.lower()
    )
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(spaced) if token not in _PUNCTUATION]


@dataclass(frozen=True)
class CaptionScores:
    """What one set of captions scores: `corpus` by metric, `samples` by metric as float64 (S,)."""

    corpus: dict[str, float]
    samples: dict[str, np.ndarray]


def score_captions(
    candidates: Sequence[str], references: Sequence[Sequence[str]], jars: Path | None = None
) -> CaptionScores:
    """Score one caption per sample against its references; the idf of CIDEr-D is that of these references.

    Args:
        candidates: S captions.
        references: S non-empty lists of reference captions.
        jars: folder with meteor-1.5.jar and spice-1.0.jar (and what these need beside them), or None.

    Returns:
        "cider", "bleu1" to "bleu4", "rouge_l"; "meteor" and "spice" only where they ran.

    Raises:
        ValueError: the lists differ in length, are empty, or a sample has no reference.
    """
    if len(candidates) != len(references) or not candidates:
        raise ValueError(f"{len(candidates)} captions for {len(references)} samples: give one caption per sample")
    lacking = next((i for i, captions in enumerate(references) if not captions), None)
    if lacking is not None:
        raise ValueError(f"sample {lacking} has no reference caption: leave it out of the evaluation")
    written = [tokenise(caption) for caption in candidates]
    wanted = [[tokenise(caption) for caption in captions] for captions in references]
    bleu_corpus, bleu_samples = bleu(written, wanted)
    samples = {"cider": cider(written, wanted), "rouge_l": rouge_l(written, wanted)}
    corpus = {name: float(values.mean()) for name, values in samples.items()}
    for n in range(ORDERS):
        corpus[f"bleu{n + 1}"], samples[f"bleu{n + 1}"] = float(bleu_corpus[n]), bleu_samples[:, n]
    for name, scorer in (("meteor", _meteor), ("spice", _spice)):
        if (values := scorer(written, wanted, jars)) is not None:
            corpus[name], samples[name] = values
    return CaptionScores(corpus, samples)


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """CIDEr-D per sample, float64 (S,): 10 times the mean over n of the clipped tf-idf cosine, damped by length.

    A document of the idf is a sample's set of references, so one sample alone scores 0. Length is counted in
    bigrams, as in the published evaluation.
    """
    counted = [[_grams(tokens) for tokens in captions] for captions in references]
    documents = Counter(gram for captions in counted for gram in set().union(*captions))
    log_samples = math.log(len(references))

    def weigh(grams: Grams) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        weights = {gram: count * (log_samples - math.log(max(1, documents[gram]))) for gram, count in grams.items()}
        norms = [0.0] * ORDERS
        for gram, weight in weights.items():
            norms[len(gram) - 1] += weight**2
        return weights, [math.sqrt(norm) for norm in norms], sum(c for gram, c in grams.items() if len(gram) == 2)

    scores = np.zeros(len(candidates))
    for i, (tokens, captions) in enumerate(zip(candidates, counted, strict=True)):
        weights, norms, length = weigh(_grams(tokens))
        for caption in captions:
            wanted, wanted_norms, wanted_length = weigh(caption)
            products = [0.0] * ORDERS
            for gram in weights.keys() & wanted.keys():
                products[len(gram) - 1] += min(weights[gram], wanted[gram]) * wanted[gram]
            cosines = (p / (a * b) if a and b else 0.0 for p, a, b in zip(products, norms, wanted_norms, strict=True))
            damping = math.exp(-((length - wanted_length) ** 2) / (2 * CIDER_SIGMA**2))
            scores[i] += 10 * damping * sum(cosines) / ORDERS / len(captions)
    return scores


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[np.ndarray, np.ndarray]:
    """BLEU-1 to -4 of the data set, float64 (4,), and of each sample, float64 (S, 4); closest reference length."""
    matches = np.zeros((len(candidates), ORDERS))
    lengths = np.array([len(tokens) for tokens in candidates], dtype=np.float64)
    closest = np.zeros(len(candidates))
    for i, (tokens, captions) in enumerate(zip(candidates, references, strict=True)):
        closest[i] = min((abs(len(caption) - len(tokens)), len(caption)) for caption in captions)[1]
        allowed: Grams = Counter()
        for caption in captions:
            allowed |= _grams(caption)
        for gram, count in (_grams(tokens) & allowed).items():
            matches[i, len(gram) - 1] += count
    guesses = np.maximum(lengths[:, None] - np.arange(ORDERS), 0)
    corpus = _bleu(matches.sum(0), guesses.sum(0), lengths.sum(), closest.sum())
    return corpus, _bleu(matches, guesses, lengths, closest)


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """ROUGE-L per sample, float64 (S,): F measure (beta 1.2) of the best precision and the best recall."""
    scores = np.zeros(len(candidates))
    for i, (tokens, captions) in enumerate(zip(candidates, references, strict=True)):
        common = [_longest_common_subsequence(tokens, caption) for caption in captions]
        precision = max(common) / max(1, len(tokens))
        recall = max(shared / max(1, len(caption)) for shared, caption in zip(common, captions, strict=True))
        if precision and recall:
            scores[i] = (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
    return scores


def _grams(tokens: Tokens) -> Grams:
    return Counter(
        tuple(tokens[start : start + n]) for n in range(1, ORDERS + 1) for start in range(len(tokens) - n + 1)
    )


def _bleu(matches: np.ndarray, guesses: np.ndarray, lengths: np.ndarray, closest: np.ndarray) -> np.ndarray:
    small, tiny = 1e-9, 1e-15  # the smoothing of the published evaluation: a sample without 4-grams is near 0, not NaN
    precisions = np.cumprod((matches + tiny) / (guesses + small), axis=-1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (lengths + tiny) / (closest + small)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return precisions * np.asarray(brevity)[..., None]


def _longest_common_subsequence(a: Tokens, b: Tokens) -> int:
    row = [0] * (len(b) + 1)
    for token in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]


def _meteor(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], jars: Path | None
) -> tuple[float, np.ndarray] | None:
    if (command := _java(jars, METEOR_JAR, "METEOR", "2G")) is None:
        return None
    try:
        with subprocess.Popen(
            [*command, "-", "-", "-stdio", "-l", "en", "-norm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=os.environ | {"LC_ALL": "C.UTF-8"},
        ) as process:
            assert process.stdin and process.stdout
            statistics = []
            for tokens, captions in zip(candidates, references, strict=True):
                process.stdin.write(" ||| ".join(["SCORE", *_lines(captions), *_lines([tokens])]) + "\n")
                process.stdin.flush()
                statistics.append(process.stdout.readline().strip())
            process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
            process.stdin.flush()
            *samples, corpus = [float(process.stdout.readline()) for _ in range(len(candidates) + 1)]
    except (OSError, ValueError) as error:
        log.warning("METEOR left out: %s stopped (%s); its data folder must lie beside it", command[-1], error)
        return None
    return corpus, np.array(samples)


def _spice(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], jars: Path | None
) -> tuple[float, np.ndarray] | None:
    if (command := _java(jars, SPICE_JAR, "SPICE", "8G")) is None:
        return None
    samples = [
        {"image_id": i, "test": line, "refs": _lines(captions)}
        for i, (line, captions) in enumerate(zip(_lines(candidates), references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "captions.json"), Path(folder, "scores.json")
        asked.write_text(json.dumps(samples))
        done = subprocess.run(
            [*command, str(asked), "-out", str(answered), "-silent"], cwd=jars, capture_output=True, text=True
        )
        if done.returncode or not answered.exists():
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            log.warning(
                "SPICE left out: %s failed (%s); its lib folder needs CoreNLP 3.6 and models", command[-1], reason
            )
            return None
        scores = {sample["image_id"]: sample["scores"]["All"]["f"] for sample in json.loads(answered.read_text())}
    values = np.array([float(scores[i]) for i in range(len(samples))])
    return float(values.mean()), values


def _java(jars: Path | None, jar: str, metric: str, memory: str) -> list[str] | None:
    if jars is None:  # not asked for
        return None
    path = jars.absolute() / jar
    if not path.exists() or shutil.which("java") is None:
        log.info("%s left out: it needs java and the file %s", metric, path)
        return None
    return ["java", f"-Xmx{memory}", "-jar", str(path)]


def _lines(captions: Iterable[Tokens]) -> list[str]:
    return [" ".join(tokens).replace("|||", " ") for tokens in captions]
