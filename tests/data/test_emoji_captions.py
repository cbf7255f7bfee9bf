import pytest

from blip_pipelines.data.sources.emoji_captions import caption, concept, country, gender, split_tones


@pytest.mark.parametrize(
    ("name", "subcategory", "tones", "expected"),
    [
        ("crab", "food-marine", (), "a crab"),
        ("orange circle", "geometric", (), "an orange circle"),
        ("unicorn", "animal-mammal", (), "a unicorn"),
        ("hourglass done", "time", (), "an hourglass that has run out"),
        ("X-ray", "medical", (), "an x-ray"),
        ("glasses", "clothing", (), "glasses"),
        ("cactus", "plant-other", (), "a cactus"),
        ("sushi", "food-asian", (), "sushi"),
        ("fork and knife with plate", "dishware", (), "a fork and a knife with a plate"),
        ("sun behind small cloud", "sky & weather", (), "a sun behind a small cloud"),
        ("three o’clock", "time", (), "a clock showing three o'clock"),
        ("Leo", "zodiac", (), "the zodiac sign leo"),
        ("keycap #", "keycap", (), "a keycap with the hash sign"),
        ("COOL button", "alphanum", (), "a button saying cool"),
        ("up-left arrow", "arrow", (), "an arrow pointing up and left"),
        ("no smoking", "warning", (), "a no smoking sign"),
        ("winking face with tongue", "face-tongue", (), "a winking face with its tongue out"),
        ("United Kingdom", "country-flag", (), "the flag of the united kingdom"),
        ("Greenland", "country-flag", (), "the flag of greenland"),
        ("rightwards hand", "hand-fingers-open", ("dark",), "a hand reaching right with dark skin tone"),
        ("man artist", "person-role", (), "a male artist"),
        ("woman rowing boat", "person-sport", ("medium",), "a woman rowing a boat with medium skin tone"),
        ("man red hair", "person", ("light",), "a man with red hair and light skin tone"),
        ("woman bald", "person", (), "a bald woman"),
        ("family man man girl boy", "family", (), "a family of two men, a girl and a boy"),
        ("family woman boy boy", "family", (), "a family of a woman and two boys"),
        ("kiss man man", "family", ("light", "dark"), "two men kissing with light and dark skin tones"),
        ("men holding hands", "family", ("light", "light"), "two men holding hands with light skin tone"),
        ("people with bunny ears", "person-activity", (), "two people in bunny ears"),
    ],
)
def test_captions_read_as_english(name, subcategory, tones, expected):
    assert caption(name, subcategory, tones) == expected


def test_tones_leave_the_name_wherever_they_stand():
    assert split_tones("woman medium-light skin tone red hair") == "woman red hair"
    assert split_tones("men holding hands light skin tone dark skin tone") == "men holding hands"
    assert split_tones("medium skin tone") == ""


def test_forms_of_one_thing_are_one_concept_and_different_things_are_not():
    for name in ("man running", "woman running facing right", "person running"):
        assert concept(name, "person-activity") == "running"
    assert concept("merman", "person-fantasy") == concept("mermaid", "person-fantasy")
    assert concept("family man boy", "family") == concept("family woman woman girl", "family")
    assert concept("man’s shoe", "clothing") != concept("woman’s sandal", "clothing")
    assert concept("man", "person") != concept("boy", "person")


def test_gender_is_known_only_where_the_name_says_it_of_everyone():
    assert gender("woman running", "person-activity") == "female"
    assert gender("men wrestling", "person-sport") == "male"
    assert gender("person running", "person-activity") is None
    assert gender("woman and man holding hands", "family") is None
    assert gender("man’s shoe", "clothing") is None


def test_countries_take_their_article():
    assert country("Netherlands") == "the netherlands"
    assert country("Falkland Islands") == "the falkland islands"
    assert country("St. Vincent & Grenadines") == "st. vincent and the grenadines"
    assert country("Trinidad & Tobago") == "trinidad and tobago"
    assert country("Heard Island & McDonald Islands") == "heard island and mcdonald islands"
