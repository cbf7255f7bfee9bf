from collections import Counter

import pytest

from blip_pipelines.config import ConfigError, read
from blip_pipelines.data.questions import Asker, DataSetConfig, Sample, TemplateError

THINGS = ["a crab", "a house", "a flag", "a clock"]


def samples(count=40, split="train", **fields):
    return [
        Sample(f"{split} {n}", (f"key {n}",), split, {"thing": THINGS[n % 4], "concept": n % 4, **fields})
        for n in range(count)
    ]


def asker(seed=0, shared=None, **values):
    block = {"task": "t", "role": "held_in", "metric": "exact_match", "table": "facts", "answer": "{thing}"}
    config = read(DataSetConfig, {"templates": ["What is it?"], **block, **values}, "data_set")
    return Asker("things", config, shared, seed)


def test_a_template_is_drawn_for_each_sample_whatever_the_others_are():
    words = [f"{n}: {{thing}}?" for n in range(5)]
    ask = asker(templates=words)
    every = list(ask.ask(samples(400)))
    assert min(Counter(question.template for question in every).values()) > 50
    assert every[7].instruction == f"{every[7].template}: a clock?" and every[7].answers == ["a clock"]
    assert list(ask.ask(samples(400)[7:9])) == every[7:9]
    assert [q.template for q in asker(seed=1, templates=words).ask(samples(400))] != [q.template for q in every]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"templates": ["fine", "What {colour}?"]}, r"things\.templates\[1\] 'What \{colour\}\?'.*no field 'colour'"),
        ({"answer": "{kind}"}, r"things\.answer '\{kind\}'.*no field 'kind'; it has concept, thing"),
        ({"candidates": "options"}, r"things\.candidates: sample train 0 has no field 'options'"),
        ({"answer": None}, r"no field 'answers' or 'answer'"),
    ],
)
def test_a_missing_field_is_an_error_that_names_template_and_field(values, message):
    with pytest.raises(TemplateError, match=message):
        list(asker(**values).ask(samples()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"templates": "colours"}, r"no list 'colours' in instructions\.templates; there are none"),
        ({"templates": []}, "empty"),
        ({"templates": ["What {is"]}, "expected '}'"),
        ({"templates": ["{thing.__class__}"]}, "no name of a field"),
        ({"candidates": "all"}, "neither a list"),
        ({"ask": {"kind": "yes_no"}}, r"ask\.about: missing"),
        ({"ask": {"kind": "choice", "about": "thing", "options": 1}}, "at least 2"),
        ({"table": None}, "either `table` or `files`"),
        ({"multiplier": -1.0}, "negative"),
    ],
)
def test_words_and_settings_that_cannot_be_are_refused_before_anything_is_read(values, message):
    with pytest.raises(ConfigError, match=message):
        asker(**values)


def test_a_sample_without_the_fact_that_is_asked_for_is_left_out():
    some = [*samples(3), Sample("x", ("k",), "train", {"thing": None, "concept": 0})]
    assert [question.sample.name for question in asker().ask(some)] == ["train 0", "train 1", "train 2"]


def test_yes_and_no_are_true_and_as_likely_and_split_keeps_to_its_own_words():
    ask = asker(ask={"kind": "yes_no", "about": "thing", "apart": "concept"}, templates=["Is this {asked}?"])
    held_out = [Sample("v", ("k",), "val", {"thing": "a dragon", "concept": 9}), *samples(40, "val")]
    questions = list(ask.ask([*samples(400), *held_out]))
    for question in questions:
        asked = question.instruction.removeprefix("Is this ").removesuffix("?")
        assert question.answers == ["yes" if asked == question.sample.fields["thing"] else "no"]
        assert question.sample.split == "val" or asked != "a dragon"
    yes = sum(question.answers == ["yes"] for question in questions)
    assert 170 < yes < 270
    assert ask.candidates(questions) == ["yes", "no"]


def test_a_claim_is_true_or_not_and_the_answer_the_same_either_way():
    ask = asker(ask={"kind": "claim", "about": "thing", "apart": "concept"}, templates=["{asked}?"], answer="{caption}")
    told = [each._replace(fields={**each.fields, "caption": f"caption {n}"}) for n, each in enumerate(samples(400))]
    questions = list(ask.ask([*told, *samples(4, "val", caption=None)]))
    assert [question.sample.name for question in questions] == [each.name for each in told]  # the others have none
    assert all(question.answers == [question.sample.fields["caption"]] for question in questions)
    true = sum(question.instruction == f"{question.sample.fields['thing']}?" for question in questions)
    assert 170 < true < 270
    assert ask.candidates(questions) is None


def test_a_choice_has_the_answer_at_any_place_among_others():
    ask = asker(ask={"kind": "choice", "about": "thing", "options": 3}, templates=["Choose: {options}"])
    questions = list(ask.ask(samples(300)))
    places = Counter(question.candidates.index(question.answers[0]) for question in questions)
    assert min(places.values()) > 70 and set(places) == {0, 1, 2}
    first = questions[0]
    assert len(set(first.candidates)) == 3
    a, b, c = first.candidates
    assert first.instruction == f"Choose: (a) {a} (b) {b} (c) {c}"


def test_a_choice_without_enough_others_is_no_question():
    ask = asker(ask={"kind": "choice", "about": "thing", "options": 5})
    assert list(ask.ask(samples(100))) == []  # there are four things


def test_context_becomes_words():
    fields = {
        "question": "What does it say?",
        "ocr": [f"word{n}" for n in range(40)],
        "history": [("Who is it?", "A man."), ("Is he old?", "No.")],
        "answers": ["stop", "stop", " go "],
    }
    template = "OCR tokens: {ocr}. {history} Question: {question}"
    question = next(asker(answer=None, templates=[template]).ask([Sample("s", ("k",), "val", fields)]))
    tokens = ", ".join(f"word{n}" for n in range(30))
    assert question.instruction == (
        f"OCR tokens: {tokens}. Q: Who is it? A: A man. Q: Is he old? A: No. Question: What does it say?"
    )
    assert question.answers == ["stop", "stop", "go"]


def test_candidates_are_a_list_or_the_commonest_training_answers():
    questions = list(asker().ask([*samples(41), *samples(1, "val", thing="a dragon")]))
    training = [question for question in questions if question.sample.split == "train"]
    assert asker(candidates="answers").candidates(training) == sorted(THINGS)
    assert asker(candidates="answers", most_candidates=1).candidates(training) == ["a crab"]  # 11 of 41
    assert asker(candidates=["x", "y"]).candidates(training) == ["x", "y"]
    assert asker().candidates(training) is None


def test_rows_of_one_value_are_limited_and_answers_balanced():
    many = [*samples(40), *(Sample(f"more {n}", ("k",), "train", {"thing": "a crab", "concept": 0}) for n in range(60))]
    limited = Counter(question.answers[0] for question in asker(at_most={"concept": 7}).ask(many))
    assert set(limited.values()) == {7}
    balanced = Counter(question.answers[0] for question in asker(balance=1.5).ask(many))
    assert balanced == {"a crab": 15, "a house": 10, "a flag": 10, "a clock": 10}
    chosen = {question.sample.name for question in asker(balance=1.5).ask(many)}
    assert chosen != {question.sample.name for question in asker(seed=1, balance=1.5).ask(many)}


def test_templates_may_be_shared_by_name():
    ask = asker(templates="naming", shared={"naming": ["Name it."]})
    assert next(ask.ask(samples(1))).instruction == "Name it."
