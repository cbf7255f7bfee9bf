"""How well the filter tells right web captions from wrong ones, and how right the captioner is, where that is known.

The known noise belongs to the evaluator: nothing that trains or decides reads it. The filter is seen as a detector of
wrong captions, which it finds by dropping them; its match probability should rank right ones above wrong ones.

Shapes: P captions.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from blip_pipelines.data.composition import REPEATS
from blip_pipelines.evaluation.captioning import tokenise

CLEAN = "clean"
COLUMNS = ("key", "caption", "origin", "match_probability", "kept", "reason")  # of decided rows, that are looked at


def measure_capfilt(decided: pa.Table, noise: pa.Table) -> dict[str, float]:
    """All measures of this module; none where the noise is not known.

    Args:
        decided: judged captions with `COLUMNS`.
        noise: key, caption, kind and truth of web captions. A synthetic caption is held against the truth of its image.
    """
    known = {(row["key"], row["caption"]): row["kind"] for row in noise.to_pylist()}
    truths: dict[str, set[str]] = {}
    for row in noise.to_pylist():
        truths.setdefault(row["key"], set()).add(row["truth"])
    rows = decided.select(COLUMNS).to_pylist()
    web = [row for row in rows if row["origin"] == "web" and (row["key"], row["caption"]) in known]
    synthetic = [row for row in rows if row["origin"] == "synthetic" and row["key"] in truths]
    metrics: dict[str, float] = {}
    if web:
        metrics |= filter_metrics(
            np.array([row["match_probability"] for row in web]),
            np.array([row["kept"] for row in web], dtype=bool),
            [known[row["key"], row["caption"]] for row in web],
        )
    if synthetic:
        metrics |= synthetic_metrics(
            [row["caption"] for row in synthetic],
            [sorted(truths[row["key"]]) for row in synthetic],
            np.array([row["kept"] or row["reason"] == REPEATS for row in synthetic], dtype=bool),
        )
    return metrics


def filter_metrics(probability_P: np.ndarray, kept_P: np.ndarray, kinds: Sequence[str]) -> dict[str, float]:
    """What scores and decisions say about captions whose kind is known.

    Args:
        probability_P: that a caption matches its image; kept_P: bool.
        kinds: "clean", or what is wrong with the caption.

    Returns:
        `filter_roc_auc`, and one `filter_roc_auc_<kind>` of the clean captions against that kind;
        `filter_precision`, the wrong share of what was dropped; `filter_recall`, the dropped share of what is wrong,
        and per kind; `web_purity_before` and `web_purity_after`, the clean share of all and of what was kept. What has
        no captions to be measured on is left out.
    """
    kind_P = np.array(kinds, dtype=object)
    is_clean_P = kind_P == CLEAN
    metrics = {
        "filter_roc_auc": roc_auc(probability_P[is_clean_P], probability_P[~is_clean_P]),
        "filter_precision": _share(~is_clean_P, ~kept_P),
        "filter_recall": _share(~kept_P, ~is_clean_P),
        "web_purity_before": _share(is_clean_P, np.ones_like(kept_P)),
        "web_purity_after": _share(is_clean_P, kept_P),
    }
    for kind in sorted(set(kinds) - {CLEAN}):
        metrics[f"filter_roc_auc_{kind}"] = roc_auc(probability_P[is_clean_P], probability_P[kind_P == kind])
        metrics[f"filter_recall_{kind}"] = _share(~kept_P, kind_P == kind)
    return {name: value for name, value in metrics.items() if not np.isnan(value)}


def synthetic_metrics(
    captions: Sequence[str], truths: Sequence[Sequence[str]], passed_P: np.ndarray
) -> dict[str, float]:
    """How right written captions are, all of them and those that the filter let pass.

    Args:
        captions: P captions; truths: for each what a person would have written, one text or more.
        passed_P: bool; those that were dropped only because the image has such a caption already are in.

    Returns:
        `synthetic_exact`, the share that equals a truth token for token; `synthetic_token_f1`, the mean of the best F1
        of its tokens with a truth's; both with `_passed` of those that passed.
    """
    pairs = [
        (tokenise(caption), [tokenise(truth) for truth in texts])
        for caption, texts in zip(captions, truths, strict=True)
    ]
    exact_P = np.array([written in wanted for written, wanted in pairs])
    best_P = np.array([max(token_f1(written, truth) for truth in wanted) for written, wanted in pairs])
    metrics = {"synthetic_exact": float(exact_P.mean()), "synthetic_token_f1": float(best_P.mean())}
    if passed_P.any():
        metrics["synthetic_exact_passed"] = float(exact_P[passed_P].mean())
        metrics["synthetic_token_f1_passed"] = float(best_P[passed_P].mean())
    return metrics


def roc_auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """Probability that a right caption scores above a wrong one, ties counted half; NaN if one is missing."""
    if not len(right) or not len(wrong):
        return float("nan")
    ordered = np.sort(wrong)
    below, not_above = np.searchsorted(ordered, right, "left"), np.searchsorted(ordered, right, "right")
    return float((below + not_above).mean() / (2 * len(wrong)))


def token_f1(caption: Sequence[str], truth: Sequence[str]) -> float:
    """Harmonic mean of the shares of tokens that the two have in common, as bags; 1 for two without tokens."""
    if not caption or not truth:
        return float(not caption and not truth)
    common = (Counter(caption) & Counter(truth)).total()
    return 2 * common / (len(caption) + len(truth))


def _share(of: np.ndarray, among: np.ndarray) -> float:
    return float(of[among].mean()) if among.any() else float("nan")
