"""From what is known of pictures to instructions and answers, by templates that are configuration.

A data set says which fields of a sample are asked for and in which words; which of its templates a sample gets is
drawn by (seed, data set, sample), so a row never depends on the rows around it. Context (OCR tokens, options, dialogue)
is a field like any other and becomes part of the words (InstructBLIP 3.1 and appendix C).
"""

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from blip_pipelines.config import ConfigError
from blip_pipelines.data import splits
from blip_pipelines.data.question_files import FilesConfig

Metric = Literal["vqa_accuracy", "ivqa_accuracy", "exact_match", "top1", "mrr", "auc", "cider"]
OCR_TOKENS = 30
YES, NO = "yes", "no"
_TRIES = 50  # to draw another sample that may stand against this one


class TemplateError(ConfigError):
    """Words that ask for something a sample does not have; names template and field."""


class Sample(NamedTuple):
    """One thing that can be asked about.

    Attributes:
        name: in its data set; draws depend on it.
        images: how the picture, or each frame of a video, is known: keys of stored images, or paths.
        fields: what templates may name.
    """

    name: str
    images: tuple[str, ...]
    split: str
    fields: Mapping[str, Any]


class Question(NamedTuple):
    """A sample put into words; `answers` one for each annotator."""

    sample: Sample
    instruction: str
    template: int
    answers: list[str]
    candidates: list[str] | None  # of this sample alone


@dataclass(frozen=True)
class AskConfig:
    """What is made of a sample before it is put into words.

    Args:
        kind: `value`: nothing; `yes_no`: `{asked}` is the sample's own value or, for every second sample, another's;
            `claim`: the same, but the answer is the data set's, whether what is said is true or not; `choice`:
            `{options}` are the sample's value among others.
        about: the field whose value that is.
        apart: a field in which the other sample must differ too.
        options: of a choice.
    """

    kind: Literal["value", "yes_no", "claim", "choice"] = "value"
    about: str = ""
    apart: str | None = None
    options: int = 3

    def __post_init__(self) -> None:
        if self.kind != "value" and not self.about:
            raise ConfigError(f"ask.about: missing; name the field that a question of kind {self.kind!r} is about")
        if self.options < 2:
            raise ConfigError(f"ask.options: {self.options}; a choice has at least 2")


@dataclass(frozen=True)
class DataSetConfig:
    """One data set: where its samples are, in which words they are asked, how answers are judged.

    Args:
        task: what is asked for, a group of data sets.
        role: `held_in` ones have training and evaluation rows, `held_out` ones evaluation rows alone.
        metric: by which `evaluation.question_answering` judges it.
        templates: words with `{field}` in them, or the name of a list in `instructions.templates`.
        table: `facts` or `captions`, for what is known of ingested pictures; null where `files` says where it is.
        files: records in files, with or without pictures of their own.
        answer: words of the answer; null takes the field `answers` (a list) or `answer`.
        candidates: what may be answered: a list; `options`, the sample's own; `answers`, those of the data set's
            training samples (also of a held-out one, of which nothing else is used); null for anything.
        most_candidates: of those `answers`, the commonest.
        multiplier: of its probability in training: p_d in proportion to it times sqrt(rows).
        weight: of its answers in losses that weigh answers (BLIP gives those of VG 0.2).
        at_most: by field, how many samples of a split may have the same value there; a draw chooses which.
        balance: no answer has more than so many times the rows of the rarest one in its split; null as it comes.
    """

    task: str
    role: Literal["held_in", "held_out"]
    metric: Metric
    templates: str | tuple[str, ...]
    table: Literal["facts", "captions"] | None = None
    files: FilesConfig | None = None
    ask: AskConfig = field(default_factory=AskConfig)
    answer: str | None = None
    candidates: str | tuple[str, ...] | None = None
    most_candidates: int = 5000
    multiplier: float = 1.0
    weight: float = 1.0
    at_most: dict[str, int] = field(default_factory=dict)
    balance: float | None = None

    def __post_init__(self) -> None:
        if (self.table is None) == (self.files is None):
            raise ConfigError("a data set has either `table` or `files`: where its samples are")
        if isinstance(self.candidates, str) and self.candidates not in ("answers", "options"):
            raise ConfigError(f"candidates: {self.candidates!r} is neither a list nor `answers` nor `options`")
        if self.multiplier < 0:
            raise ConfigError(f"multiplier: {self.multiplier} is negative")


class Asker:
    """Puts the samples of one data set into words.

    Args:
        name: of the data set, `instructions.data_sets.<name>` in messages.
        templates: the lists that the data set may name.
    """

    def __init__(
        self, name: str, config: DataSetConfig, templates: Mapping[str, Sequence[str]] | None = None, seed: int = 0
    ):
        self.name, self.config, self.seed = name, config, seed
        self._where = f"instructions.data_sets.{name}"
        self.templates = self._find(config.templates, templates or {})

    def ask(self, samples: Iterable[Sample]) -> Iterator[Question]:
        """Questions in the order of the samples; a sample without what is asked for is left out.

        Raises:
            TemplateError: the words name a field that the sample has not; names template and field.
        """
        questions = self._ask(samples)
        yield from self._balanced(list(questions)) if self.config.balance else questions

    def candidates(self, training: Iterable[Question]) -> list[str] | None:
        """What may be answered to every question of the data set; None where anything may, or each has its own."""
        if self.config.ask.kind == "yes_no":
            return [YES, NO]
        if self.config.candidates != "answers":
            return None if isinstance(self.config.candidates, str | None) else list(self.config.candidates)
        counts = Counter(answer for question in training for answer in question.answers)
        return sorted(answer for answer, _ in counts.most_common(self.config.most_candidates))

    def _ask(self, samples: Iterable[Sample]) -> Iterator[Question]:
        ask = self.config.ask
        if ask.kind == "value":
            samples = (sample for sample in samples if self._answers(sample))
        else:
            samples = (sample for sample in samples if sample.fields.get(ask.about) is not None)
        for limited, most in self.config.at_most.items():
            samples = self._at_most(list(samples), limited, most)
        if ask.kind == "value":
            for sample in samples:
                yield self._put(sample, self._answers(sample), self._candidates(sample))
            return
        samples = list(samples)
        pools: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:  # an evaluation question never brings a training one a word that is held out
            pools[sample.split].append(sample)
        make = {"yes_no": self._yes_no, "claim": self._claim, "choice": self._choice}[ask.kind]
        for sample in samples:
            if question := make(sample, pools[sample.split]):
                yield question

    def _yes_no(self, sample: Sample, pool: Sequence[Sample]) -> Question | None:
        asked = self._asked(sample, pool)
        return asked and self._put(asked, [YES if self._is_true(sample) else NO], None)

    def _claim(self, sample: Sample, pool: Sequence[Sample]) -> Question | None:
        asked, answers = self._asked(sample, pool), self._answers(sample)
        return self._put(asked, answers, self._candidates(sample)) if asked and answers else None

    def _is_true(self, sample: Sample) -> bool:
        return self._draw("truth", sample) < 0.5

    def _asked(self, sample: Sample, pool: Sequence[Sample]) -> Sample | None:
        """The sample with what is said of it, true or not; None where there is nothing else to say."""
        said = [sample.fields[self.config.ask.about]] if self._is_true(sample) else self._others(sample, pool, 1)
        return sample._replace(fields={**sample.fields, "asked": said[0]}) if said else None

    def _choice(self, sample: Sample, pool: Sequence[Sample]) -> Question | None:
        own = sample.fields[self.config.ask.about]
        others = self._others(sample, pool, self.config.ask.options - 1)
        if others is None:
            return None
        place = int(self._draw("place", sample) * self.config.ask.options)
        options = [*others[:place], own, *others[place:]]
        return self._put(sample._replace(fields={**sample.fields, "options": options}), [own], options)

    def _others(self, sample: Sample, pool: Sequence[Sample], count: int) -> list[str] | None:
        """Distinct values of other samples of the pool, as frequent as there; None where there are not enough."""
        about, apart = self.config.ask.about, self.config.ask.apart
        found: list[str] = []
        for attempt in range(_TRIES):
            other = pool[int(self._draw(f"other {attempt}", sample) * len(pool))].fields
            value, is_apart = other[about], apart is None or other.get(apart) != sample.fields.get(apart)
            if is_apart and value != sample.fields[about] and value not in found:
                found.append(value)
                if len(found) == count:
                    return found
        return None

    def _answers(self, sample: Sample) -> list[str]:
        fields, words = sample.fields, self.config.answer
        if words is not None:
            if any(fields.get(name, "") is None for name in _names(words)):
                return []  # a fact that this sample has not, which is no fault
            return [self._fill(words, "answer", sample)]
        answers = fields.get("answers", fields.get("answer"))
        if answers is None:
            raise TemplateError(
                f"{self._where}: sample {sample.name} has no field 'answers' or 'answer'; give `answer`"
            )
        texts = [str(answer).strip() for answer in (answers if isinstance(answers, list | tuple) else [answers])]
        return [text for text in texts if text]

    def _candidates(self, sample: Sample) -> list[str] | None:
        if self.config.candidates != "options":
            return None
        if not (options := sample.fields.get("options")):
            raise TemplateError(f"{self._where}.candidates: sample {sample.name} has no field 'options'")
        return list(map(str, options))

    def _put(self, sample: Sample, answers: list[str], candidates: list[str] | None) -> Question:
        number = int(self._draw("template", sample) * len(self.templates))
        words = self._fill(self.templates[number], f"templates[{number}]", sample)
        return Question(sample, words, number, answers, candidates)

    def _fill(self, words: str, which: str, sample: Sample) -> str:
        filled = []
        for text, name, _, _ in string.Formatter().parse(words):
            filled.append(text)
            if name is not None:
                value = sample.fields.get(name)
                if value is None:
                    raise TemplateError(
                        f"{self._where}.{which} {words!r}: sample {sample.name} has no field '{name}'; it has "
                        f"{', '.join(sorted(key for key, known in sample.fields.items() if known is not None))}"
                    )
                filled.append(CONTEXTS.get(name, str)(value))
        return "".join(filled).strip()

    def _find(self, templates: str | tuple[str, ...], known: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        if isinstance(templates, str):
            if templates not in known:
                raise ConfigError(
                    f"{self._where}.templates: no list '{templates}' in instructions.templates; "
                    f"there are {', '.join(known) or 'none'}"
                )
            templates = tuple(known[templates])
        if not templates:
            raise ConfigError(f"{self._where}.templates: empty; give at least one")
        for number, words in enumerate(templates):
            try:
                names = _names(words)
            except ValueError as error:
                raise ConfigError(f"{self._where}.templates[{number}] {words!r}: {error}") from error
            if wrong := [name for name in names if not name.isidentifier()]:
                raise ConfigError(f"{self._where}.templates[{number}] {words!r}: {wrong[0]!r} is no name of a field")
        return templates

    def _at_most(self, samples: list[Sample], limited: str, most: int) -> list[Sample]:
        ordered = sorted(range(len(samples)), key=lambda index: self._draw(f"at most {limited}", samples[index]))
        seen: Counter[tuple[str, Any]] = Counter()
        kept = set()
        for index in ordered:
            value = samples[index].split, samples[index].fields.get(limited)
            seen[value] += 1
            if seen[value] <= most:
                kept.add(index)
        return [sample for index, sample in enumerate(samples) if index in kept]

    def _balanced(self, questions: list[Question]) -> list[Question]:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for question in questions:
            counts[question.sample.split][question.answers[0]] += 1
        most = {split: int(min(found.values()) * (self.config.balance or 1)) for split, found in counts.items()}
        ordered = sorted(range(len(questions)), key=lambda index: self._draw("balance", questions[index].sample))
        seen: Counter[tuple[str, str]] = Counter()
        kept = set()
        for index in ordered:
            value = questions[index].sample.split, questions[index].answers[0]
            seen[value] += 1
            if seen[value] <= most[value[0]]:
                kept.add(index)
        return [question for index, question in enumerate(questions) if index in kept]

    def _draw(self, purpose: str, sample: Sample) -> float:
        return splits.draw(self.seed, purpose, self.name, sample.name)


def lettered(options: Sequence[Any]) -> str:
    """ "(a) a crab (b) a house (c) a flag"."""
    return " ".join(f"({letter}) {option}" for letter, option in zip(string.ascii_lowercase, options, strict=False))


def first_tokens(tokens: Sequence[Any]) -> str:
    """The first 30 OCR tokens, comma joined."""
    return ", ".join(map(str, tokens[:OCR_TOKENS]))


def dialogue(turns: Sequence[Sequence[Any]]) -> str:
    """(question, answer) turns, the oldest first."""
    return " ".join(f"Q: {question} A: {answer}" for question, answer in turns)


# Fields that are more than a word.
CONTEXTS: dict[str, Callable[[Any], str]] = {"options": lettered, "ocr": first_tokens, "history": dialogue}


def _names(words: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(words) if name is not None]
