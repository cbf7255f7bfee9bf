from collections import Counter

from blip_pipelines.data import splits
from blip_pipelines.data.splits import SplitConfig, by_image, draw, held_out_variants, of_drawing, sample

TONES = [("light",), ("medium",), ("dark",)]


def _assign(concept, tones=(), second_style=False, combos=frozenset(), /, **shares):
    return of_drawing(
        concept, tones, second_style=second_style, combos=set(combos), config=SplitConfig(**shares), seed=3
    )


def test_draws_depend_on_seed_and_names_alone_and_fill_the_interval_evenly():
    assert draw(1, "a", "b") == draw(1, "a", "b") != draw(2, "a", "b")
    assert draw(1, "ab", "c") != draw(1, "a", "bc")
    values = [draw(0, "row", number) for number in range(4000)]
    tenths = Counter(int(10 * value) for value in values)
    # 400 expected in each; 5 standard deviations of a binomial
    assert all(abs(count - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5 for count in tenths.values())


def test_an_unseen_concept_is_unseen_in_every_style_and_tone():
    for style in (False, True):
        assert _assign("crab", (), style, concept=1.0)[1] == "concept"
        assert _assign("crab", ("dark",), style, concept=1.0)[1] == "concept_toned"


def test_an_unseen_drawing_is_of_the_second_style_alone():
    assert _assign("crab", (), True, concept=0.0, image=1.0)[1] == "image"
    assert _assign("crab", ("dark",), True, concept=0.0, image=1.0)[1] == "image_toned"
    assert _assign("crab", (), False, concept=0.0, image=1.0) == splits.TRAIN


def test_a_combination_is_unseen_in_both_styles():
    combos = {("hand", "dark")}
    for style in (False, True):
        assert _assign("hand", ("dark",), style, combos, concept=0.0, image=0.0)[1] == "combo"
        assert _assign("hand", ("light",), style, combos, concept=0.0, image=0.0) == splits.TRAIN


def test_of_every_concept_some_combination_stays_seen():
    variants = {f"concept {number}": TONES for number in range(300)}
    held_out = held_out_variants(variants, 0.6, seed=0)
    assert held_out
    assert max(Counter(variant[0] for variant in held_out).values()) < len(TONES)


def test_everything_held_out_of_a_concept_is_in_one_half():
    for number in range(50):
        concept, combos = f"concept {number}", {(f"concept {number}", "dark")}
        halves = {_assign(concept, ("dark",), style, combos, concept=0.0, image=0.5)[0] for style in (False, True)}
        assert len(halves - {"train"}) == 1


def test_images_without_a_split_are_divided_by_content():
    config = SplitConfig(validation=0.2, test=0.1)
    counts = Counter(by_image(f"{number:x}", config, seed=0) for number in range(2000))
    assert abs(counts["val"] - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5
    assert abs(counts["test"] - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5


def test_a_sample_keeps_every_cell_and_a_larger_one_holds_it():
    items = [f"image {number}" for number in range(1000)]
    cells = [("val", "combo") if number % 100 == 0 else ("train", None) for number in range(1000)]
    small, large = (sample(items, cells, items, size, seed=0) for size in (50, 200))
    assert sum(int(item.split()[1]) % 100 == 0 for item in small) == 4
    assert set(small) < set(large)
    assert small == sorted(small, key=items.index)
    assert sample(items, cells, items, 5000, seed=0) == items
