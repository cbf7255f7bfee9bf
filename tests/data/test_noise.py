from collections import Counter

import pytest

from blip_pipelines.config import ConfigError
from blip_pipelines.data import noise
from blip_pipelines.data.noise import NoiseConfig, Pool, of_the_web

POOL = Pool([(f"concept {n}", f"a thing {n}") for n in range(50)], {"de": {f"key {n}": f"ding {n}" for n in range(50)}})
ROWS = [(f"row {n}", f"key {n % 50}", f"concept {n % 50}", f"a thing {n % 50}") for n in range(4000)]


def _spoil(config=NoiseConfig(), seed=0):  # noqa: B008
    return [of_the_web(*row, POOL, config, seed) for row in ROWS]


def test_the_known_share_is_wrong_and_the_kinds_have_theirs():
    kinds = Counter(kind for kind, _ in _spoil())
    wrong = len(ROWS) - kinds[noise.CLEAN]
    assert abs(wrong - 0.4 * 4000) < 5 * (4000 * 0.4 * 0.6) ** 0.5
    for kind, share in ((noise.SWAP, 0.55), (noise.FILE_NAME, 0.15), (noise.LANGUAGE, 0.15), (noise.ADVERTISING, 0.15)):
        assert abs(kinds[kind] - share * wrong) < 5 * (wrong * share * (1 - share)) ** 0.5


def test_what_is_called_clean_is_the_truth_and_what_is_called_wrong_is_not():
    for (_, _, concept, caption), (kind, text) in zip(ROWS, _spoil(), strict=True):
        assert (text == caption) == (kind == noise.CLEAN)
        if kind == noise.SWAP:
            assert dict(map(reversed, POOL.captions))[text] != concept


def test_a_rows_fate_does_not_depend_on_other_rows():
    alone = of_the_web(*ROWS[17], POOL, NoiseConfig(), 0)
    assert alone == _spoil()[17]
    assert _spoil(seed=1) != _spoil()


def test_a_row_without_a_foreign_name_is_swapped_instead():
    config = NoiseConfig(share=1.0, swap=0.0, file_name=0.0, language=1.0, advertising=0.0)
    kind, text = of_the_web("row", "no such key", "concept 3", "a thing 3", POOL, config, 0)
    assert kind == noise.SWAP and text != "a thing 3"


def test_shares_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ConfigError, match=r"sum to 1\.2"):
        NoiseConfig(swap=0.75)
