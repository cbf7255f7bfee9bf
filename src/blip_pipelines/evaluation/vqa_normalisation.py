"""Answers as the official VQA evaluation compares them (Antol et al. 2015; the evaluation code of VQA v2).

Its quirks are kept, for published figures contain them: one comma between digits anywhere makes all punctuation
vanish instead of becoming spaces, a period goes unless a digit follows it, only the first 32 of them, and no more than
the words none and zero to ten become digits.
"""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # upstream hands a flag to `re.sub` in the place of the count
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# With one of its apostrophes missing a word is taken for the contraction; upstream has one the wrong way round.
_RESTORED = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """A model's answer: punctuation, number words, articles and contractions as the official evaluation treats them."""
    return normalise_words(normalise_punctuation(one_line(answer)))


def one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise_punctuation(answer: str) -> str:
    """Without punctuation: it vanishes beside a space, or everywhere if a comma parts digits, and is a space else."""
    cleaned, drops_all = answer, _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        vanishes = drops_all or f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    return _PERIOD.sub("", cleaned, count=_PERIODS_REMOVED)


def normalise_words(answer: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes where contractions lack them."""
    words = (_NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
