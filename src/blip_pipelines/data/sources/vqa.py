"""VQA v2 and what shares its layout (OK-VQA): a file of questions and one of annotations, over COCO's images.

A caption row is the question with its answer behind it, written by `template`: so the pair trains and filters like any
other text of the image.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from blip_pipelines.config import ConfigError
from blip_pipelines.data.places import Place
from blip_pipelines.data.records import Caption
from blip_pipelines.data.sources import Quarantined, SourceError
from blip_pipelines.data.sources.files import SPLITS, FileSource, Row, check_choice, is_utf8, read_annotations


@dataclass(frozen=True)
class QuestionFile:
    """One file of questions.

    Args:
        annotations: the file of its answers.
        images: folder of its images within the source's.
        split: of its images; None leaves the choice to ingestion.
    """

    annotations: str
    images: str = ""
    split: str | None = None

    def __post_init__(self) -> None:
        check_choice("questions.<file>.split", self.split, SPLITS)


@dataclass(frozen=True)
class VqaConfig:
    """Args:
    questions: by file name within the source's folder, what belongs to it.
    image: name of an image's file, of the fields image_id and subset (the file's data_subtype, as train2014).
    answers: "majority" takes multiple_choice_answer (else the most frequent), "all" every different answer.
    template: of a caption, of the fields question and answer.
    """

    questions: dict[str, QuestionFile] = field(default_factory=dict)
    image: str = "COCO_{subset}_{image_id:012d}.jpg"
    answers: Literal["majority", "all"] = "majority"
    template: str = "{question} {answer}"
    language: str | None = "en"
    name: str = "vqa"

    def __post_init__(self) -> None:
        for key, values in (("image", {"image_id": 1, "subset": "x"}), ("template", {"question": "", "answer": ""})):
            try:
                getattr(self, key).format(**values)
            except (KeyError, IndexError, ValueError) as error:
                raise ConfigError(
                    f"ingestion.source.options.{key}: {getattr(self, key)!r} is no template of {', '.join(values)} "
                    f"({error!r})"
                ) from error


class VqaSource(FileSource):
    """Questions with their answers as captions; see the module."""

    def __init__(self, place: Place, config: VqaConfig):
        super().__init__(place, config.name)
        self.config = config
        if not config.questions:
            raise SourceError(
                "ingestion.source.options.questions: name the files, as {v2_OpenEnded_mscoco_train2014_questions.json: "
                "{annotations: v2_mscoco_train2014_annotations.json, images: train2014, split: train}}"
            )

    def rows(self) -> Iterator[Row | Quarantined]:
        for file, about in self.config.questions.items():
            found = read_annotations(self.place, file, "questions")
            answers = read_annotations(self.place, about.annotations, "questions.<file>.annotations")
            for name, content, key in ((file, found, "questions"), (about.annotations, answers, "annotations")):
                if not isinstance(content, dict) or not isinstance(content.get(key), list):
                    raise SourceError(f"{self.place.url(name)}: has no list '{key}'; it is not laid out as VQA's")
            of_question = {each.get("question_id"): each for each in answers["annotations"] if isinstance(each, dict)}
            for number, question in enumerate(found["questions"]):
                where = f"{file}, question {number}"
                yield from self._rows_of(where, question, of_question, found.get("data_subtype", ""), about)

    def _rows_of(
        self, where: str, question: Any, answers: dict[Any, Any], subset: str, about: QuestionFile
    ) -> Iterator[Row | Quarantined]:
        try:
            name = self.config.image.format(image_id=question["image_id"], subset=subset)
            text, annotation = question["question"], answers.get(question["question_id"])
        except (KeyError, TypeError, ValueError) as error:
            yield Quarantined(where, "bad_row", f"no question_id, image_id or question ({error!r}): {question!r:.200}")
            return
        member = f"{about.images.strip('/')}/{name}".lstrip("/")
        given = _answers(annotation, self.config.answers) if annotation is not None else []
        if not given:
            yield Quarantined(member, "no_answer", f"{where}: {about.annotations} has no answer to it")
        for answer in given:
            caption = self.config.template.format(question=text, answer=answer)
            if not isinstance(text, str) or not isinstance(answer, str):
                yield Quarantined(member, "bad_row", f"{where}: question or answer is no text: {caption:.80}")
            elif not is_utf8(caption):
                yield Quarantined(member, "invalid_utf8", f"{where}: holds half a character")
            else:
                yield Row(member, Caption(caption, "human", self.config.language), about.split)


def _answers(annotation: Any, which: str) -> list[Any]:
    listed = [each.get("answer") for each in annotation.get("answers", ()) if isinstance(each, dict)]
    if which == "all":
        return list(dict.fromkeys(listed))
    if (majority := annotation.get("multiple_choice_answer")) is not None:
        return [majority]
    return [max(dict.fromkeys(listed), key=listed.count)] if listed else []
