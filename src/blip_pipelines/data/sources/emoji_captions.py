"""Unicode's short names turned into captions that read as English: "woman rowing boat" is "a woman rowing a boat".

Rules first, then a table for what no rule gets right. Captions are lower case, as BLIP's own texts are.
"""

import re

TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}

_TONE = re.compile(r" ?\b(?:medium-light|medium-dark|light|medium|dark) skin tone\b")
_GENDERS = {
    "woman": "female", "women": "female", "girl": "female", "mermaid": "female", "princess": "female", "mrs.": "female",
    "man": "male", "men": "male", "boy": "male", "merman": "male", "prince": "male", "santa": "male",
}  # fmt: skip
_PLURALS = {"man": "men", "woman": "women", "boy": "boys", "girl": "girls", "adult": "adults", "child": "children"}

# Flags whose country takes "the" where no rule sees it, and names that read badly.
_COUNTRIES_WITH_THE = {
    "bahamas", "gambia", "comoros", "maldives", "netherlands", "caribbean netherlands", "philippines", "seychelles",
    "isle of man", "european union", "french southern and antarctic lands",
}  # fmt: skip
_COUNTRIES = {
    "hong kong sar china": "hong kong",
    "macao sar china": "macao",
    "myanmar (burma)": "myanmar",
    "cocos (keeling) islands": "the cocos islands",
    "congo-kinshasa": "the democratic republic of the congo",
    "congo-brazzaville": "the republic of the congo",
    "south georgia & south sandwich islands": "south georgia and the south sandwich islands",
    "st. vincent & grenadines": "st. vincent and the grenadines",
    "st. helena ascension & tristan da cunha": "st. helena, ascension and tristan da cunha",
    "heard island & mcdonald islands": "heard island and mcdonald islands",
    "u.s. outlying islands": "the us outlying islands",
    "u.s. virgin islands": "the us virgin islands",
}

# Whole captions of names that no rule turns into English.
_EXCEPTIONS = {
    "1st place medal": "a first place medal",
    "2nd place medal": "a second place medal",
    "3rd place medal": "a third place medal",
    "airplane arrival": "an airplane landing",
    "airplane departure": "an airplane taking off",
    "backhand index pointing down": "the back of a hand pointing down",
    "backhand index pointing left": "the back of a hand pointing left",
    "backhand index pointing right": "the back of a hand pointing right",
    "backhand index pointing up": "the back of a hand pointing up",
    "baguette bread": "a baguette",
    "badminton": "a badminton racket and a shuttlecock",
    "ballot box with ballot": "a ballot box with a ballot",
    "beach with umbrella": "a beach with an umbrella",
    "biting lip": "a mouth biting its lip",
    "bottle with popping cork": "a bottle with a popping cork",
    "bowling": "a bowling ball and pins",
    "breast-feeding": "a woman breast-feeding a baby",
    "building construction": "a building under construction",
    "construction": "a construction barrier",
    "call me hand": "a hand making a call me sign",
    "chart increasing with yen": "a rising chart with a yen sign",
    "chart increasing": "a rising chart",
    "chart decreasing": "a falling chart",
    "cricket game": "a cricket bat and a ball",
    "cooking": "an egg in a frying pan",
    "couple with heart": "a loving couple",
    "couple with heart person person": "a loving couple",
    "couple with heart man man": "two loving men",
    "couple with heart woman man": "a loving woman and man",
    "couple with heart woman woman": "two loving women",
    "dim button": "a button for dim light",
    "bright button": "a button for bright light",
    "dashing away": "a dashing away symbol",
    "dizzy": "a dizzy star",
    "eye in speech bubble": "an eye in a speech bubble",
    "face vomiting": "a vomiting face",
    "face with bags under eyes": "a face with bags under its eyes",
    "face with steam from nose": "a face with steam from its nose",
    "face with symbols on mouth": "a face with symbols on its mouth",
    "family": "a family",
    "field hockey": "a field hockey stick and a ball",
    "face without mouth": "a face without a mouth",
    "fish cake with swirl": "a fish cake with a swirl",
    "flag in hole": "a golf flag in a hole",
    "foggy": "a foggy city",
    "flower playing cards": "flower playing cards",
    "game die": "a die",
    "globe showing americas": "a globe showing the americas",
    "globe showing asia-australia": "a globe showing asia and australia",
    "globe showing europe-africa": "a globe showing europe and africa",
    "hand with index finger and thumb crossed": "a hand with finger and thumb crossed",
    "head shaking horizontally": "a face shaking its head",
    "head shaking vertically": "a face nodding its head",
    "heart exclamation": "a heart exclamation mark",
    "high voltage": "a high voltage sign",
    "horse racing": "a jockey racing a horse",
    "hourglass done": "an hourglass that has run out",
    "hourglass not done": "an hourglass that is running",
    "hundred points": "a hundred points symbol",
    "ice": "an ice cube",
    "ice hockey": "an ice hockey stick and a puck",
    "index pointing at the viewer": "a finger pointing at the viewer",
    "index pointing up": "a finger pointing up",
    "information": "an information sign",
    "input latin letters": "a button for latin letters",
    "input latin lowercase": "a button for lowercase letters",
    "input latin uppercase": "a button for uppercase letters",
    "input numbers": "a button for numbers",
    "input symbols": "a button for symbols",
    "joker": "a joker card",
    "kiss": "a couple kissing",
    "kiss man man": "two men kissing",
    "kiss person person": "a couple kissing",
    "kiss woman man": "a woman and a man kissing",
    "kiss woman woman": "two women kissing",
    "lacrosse": "a lacrosse stick and a ball",
    "leaf fluttering in wind": "leaves fluttering in the wind",
    "left luggage": "a left luggage sign",
    "left speech bubble": "a speech bubble on the left",
    "right anger bubble": "an anger bubble on the right",
    "leftwards hand": "a hand reaching left",
    "leftwards pushing hand": "a hand pushing left",
    "rightwards hand": "a hand reaching right",
    "rightwards pushing hand": "a hand pushing right",
    "light rail": "a light rail train",
    "locked": "a closed lock",
    "locked with key": "a closed lock with a key",
    "locked with pen": "a closed lock with a pen",
    "unlocked": "an open lock",
    "mate": "a cup of mate",
    "meat on bone": "meat on the bone",
    "men holding hands": "two men holding hands",
    "men with bunny ears": "two men in bunny ears",
    "men wrestling": "two men wrestling",
    "milky way": "the milky way",
    "mrs. claus": "mrs. claus",
    "nail polish": "a hand with nail polish",
    "o button (blood type)": "a button for blood type o",
    "a button (blood type)": "a button for blood type a",
    "b button (blood type)": "a button for blood type b",
    "ab button (blood type)": "a button for blood type ab",
    "ok hand": "a hand making an ok sign",
    "mahjong red dragon": "a red dragon mahjong tile",
    "headphone": "headphones",
    "currency exchange": "a currency exchange symbol",
    "skull and crossbones": "a skull and crossbones",
    "palm down hand": "a hand held palm down",
    "palm up hand": "a hand held palm up",
    "palms up together": "two palms held up together",
    "people holding hands": "two people holding hands",
    "people hugging": "two people hugging",
    "people with bunny ears": "two people in bunny ears",
    "people wrestling": "two people wrestling",
    "performing arts": "theater masks",
    "person in bed": "a person in bed",
    "ping pong": "a ping pong paddle and a ball",
    "potable water": "a drinking water sign",
    "non-potable water": "a no drinking water sign",
    "pouring liquid": "a glass pouring liquid",
    "raised back of hand": "the raised back of a hand",
    "red hair": "red hair", "curly hair": "curly hair", "white hair": "white hair", "bald": "a bald head",
    "rolling on the floor laughing": "a face rolling on the floor laughing",
    "selfie": "a hand taking a selfie",
    "sign of the horns": "a hand making the sign of the horns",
    "speaker low volume": "a speaker at low volume",
    "speaker medium volume": "a speaker at medium volume",
    "speaker high volume": "a speaker at high volume",
    "star-struck": "a star-struck face",
    "statue of liberty": "the statue of liberty",
    "sunrise over mountains": "a sunrise over mountains",
    "tennis": "a tennis racket and a ball",
    "tokyo tower": "tokyo tower",
    "trade mark": "a trademark sign",
    "copyright": "a copyright sign",
    "registered": "a registered sign",
    "up! button": "a button saying up",
    "victory hand": "a hand making a victory sign",
    "woman and man holding hands": "a woman and a man holding hands",
    "women holding hands": "two women holding hands",
    "women with bunny ears": "two women in bunny ears",
    "women wrestling": "two women wrestling",
    "writing hand": "a hand writing with a pen",
    "zzz": "a zzz symbol",
    "clockwise vertical arrows": "clockwise arrows",
    "counterclockwise arrows button": "a button with counterclockwise arrows",
}  # fmt: skip

# Nothing stands before these: what cannot be counted, and names of persons and places.
_UNCOUNTED = {
    "bacon", "bread", "bubble tea", "butter", "candy", "canned food", "confetti", "cooked rice", "coral", "curry rice",
    "broccoli", "custard", "dango", "fire", "fog", "fried shrimp", "garlic", "ginger root", "ice cream", "milk",
    "money with wings", "mount fuji", "mx claus", "oden", "popcorn", "sake", "salt", "santa claus", "shaved ice",
    "soap", "soft ice cream", "spaghetti", "sushi", "thread", "wood", "yarn", "dna", "luggage", "camping", "falafel",
}  # fmt: skip
# They end in s and are one thing.
_SINGULAR_S = {
    "bus", "trolleybus", "minibus", "cactus", "octopus", "lotus", "hibiscus", "compass", "rhinoceros", "hippopotamus",
    "abacus",
}  # fmt: skip
_AN = re.compile(r"^(?:[aeio]|u(?!n(?:i)|s)|hourglass|x-ray|sos\b|ng\b)")
_A = re.compile(r"^(?:one\b|once|one-|euro|ewe)")
# Nouns that take an article inside a phrase.
_INNER = re.compile(
    r"\b(with|in|behind|on|and|without|getting|wearing|raising|tipping|feeding|bouncing|rowing|taking|at|over) "
    r"(arrow|curl|ribbon|key|pen|face|garden|flash|slash|dot|plate|straw|spoon|lamp|knife|bolt|wrench|pick|handle|halo|"
    r"thermometer|monocle|medical mask|head-bandage|open mouth|raised eyebrow|wry smile|peeking eye|diagonal mouth|"
    r"tear|small cloud|large cloud|rain cloud|cloud|check|decorative cover|raised flag|lowered flag|white cane|"
    r"motorized wheelchair|manual wheelchair|veil|turban|skullcap|crown|headscarf|massage|haircut|bath|steamy room|"
    r"ball|hand|baby|boat|tuxedo|suit|hearing aid|beard|cowboy hat)\b"
)
_PERSON = r"(?:woman|man|person)"


def split_tones(name: str) -> str:
    """The name without its skin tones: "woman medium skin tone red hair" is "woman red hair"."""
    return _TONE.sub("", name).strip()


def country(name: str) -> str:
    """The country of a flag with the article it takes: "the netherlands", "france"."""
    name = _plain(name)
    if name in _COUNTRIES:
        return _COUNTRIES[name]
    takes_the = name in _COUNTRIES_WITH_THE or re.search(
        r"^united |\b(?:republic|territory|territories|emirates)$|(?<!\band )islands$", name
    )
    return ("the " if takes_the else "") + name.replace(" & ", " and ")


def caption(name: str, subcategory: str, tones: tuple[str, ...] = ()) -> str:
    """What a person would write under the picture.

    Args:
        name: Unicode's short name without skin tones, words divided by spaces.
        subcategory: Unicode's, such as "person-role".
        tones: names of the skin tones in the order of the persons.
    """
    phrase = _phrase(_plain(name), subcategory)
    if not tones:
        return phrase
    tones = tuple(dict.fromkeys(tones))  # two persons of one tone share the word
    tone = f"{' and '.join(tones)} skin tone{'s' if len(tones) > 1 else ''}"
    return f"{phrase} {'and' if ' with ' in phrase else 'with'} {tone}"


def gender(name: str, subcategory: str) -> str | None:
    """Whether the name says that the person (or all persons) is female or male; None where it does not."""
    if not subcategory.startswith(("person", "family")):
        return None
    found = {_GENDERS[word] for word in _plain(name).split() if word in _GENDERS}
    return found.pop() if len(found) == 1 else None


def concept(name: str, subcategory: str) -> str:
    """What is shown whoever does it: man, woman and person running, facing either way, are one concept."""
    name = _plain(name)
    if not subcategory.startswith(("person", "family")):
        return name
    for pattern, together in (
        (r"^family\b.*", "family"),
        (r"^kiss\b.*", "kiss"),
        (r"^couple with heart\b.*", "couple with heart"),
        (r".*\bholding hands$", "holding hands"),
        (r".*\bclaus$", "claus"),
        (r"^mer(?:maid|man|person)$", "merperson"),
        (r"^(?:prince|princess|person with crown)$", "royal"),
        (r"^(?:boy|girl|child)$", "child"),
        (r"^(?:man|woman|person)$", "adult"),
        (r"^old(?:er)? (?:man|woman|person)$", "older adult"),
    ):
        if re.fullmatch(pattern, name):
            return together
    name = re.sub(r"\b(?:man|woman|person|men|women|people)\b ?|,? facing right$", "", name)
    return " ".join(name.split())


def _plain(name: str) -> str:
    return name.lower().replace("’", "'")


def _phrase(name: str, subcategory: str) -> str:
    if name in _EXCEPTIONS:
        return _EXCEPTIONS[name]
    if subcategory in ("country-flag", "subdivision-flag"):
        return f"the flag of {country(name)}"
    if name.startswith("family "):
        return f"a family of {_members(name.split()[1:])}"
    if subcategory.startswith("person"):
        name = _person(name)
    name = _sign(name, subcategory)
    name = re.sub(r"\bwith tongue\b", "with its tongue out", name)
    name = re.sub(r"\bhand over mouth\b", "hand over its mouth", name)
    name = re.sub(r"\bon ground\b", "on the ground", name)
    name = re.sub(r"\blotus position\b", "the lotus position", name)
    name = re.sub(r"^(black|white) ([a-z-]+) square$", r"\2 \1 square", name)
    name = name.replace(" pointed ", " pointing ")
    name = _INNER.sub(lambda found: f"{found[1]} {_article(found[2])}", name)
    return name if _needs_none(name) else _article(name)


def _members(words: list[str]) -> str:
    kinds = list(dict.fromkeys(words))
    counted = [f"two {_PLURALS[kind]}" if words.count(kind) == 2 else _article(kind) for kind in kinds]
    return " and ".join([*([", ".join(counted[:-1])] if counted[1:] else []), counted[-1]])


def _person(name: str) -> str:
    name = re.sub(rf"^({_PERSON}) (red|curly|white|blond) hair$", r"\1 with \2 hair", name)
    name = re.sub(rf"^({_PERSON}) beard$", r"\1 with beard", name)
    name = re.sub(rf"^({_PERSON}) bald$", r"bald \1", name)
    name = re.sub(r"\bgesturing (no|ok)$", r"gesturing \1", name)
    doer = re.match(r"^(man|woman) (?!in |with )", name)
    if doer and not re.search(r"ing\b", name):
        name = name.replace(doer[1], "male" if doer[1] == "man" else "female", 1)
    return name


def _sign(name: str, subcategory: str) -> str:
    """Names of signs, keys, clock faces and arrows, which Unicode gives as the bare word on them."""
    if subcategory == "time" and name.endswith(("o'clock", "thirty")):
        return f"clock showing {name}"
    if subcategory == "zodiac":
        return f"the zodiac sign {name}"
    if subcategory == "keycap":
        key = name.removeprefix("keycap ")
        return f"keycap with {'the ' + {'#': 'hash sign', '*': 'asterisk'}.get(key, 'number ' + key)}"
    if subcategory == "alphanum" and (word := re.fullmatch(r"(cl|cool|free|id|new|ng|ok|sos|vs|p) button", name)):
        return f"button saying {word[1]}"
    if subcategory == "alphanum" and (word := re.fullmatch(r"japanese (.+) button", name)):
        return f"japanese button for {word[1]}"
    if subcategory == "arrow" and (way := re.fullmatch(r"(?:(up|down|left|right)-)?(up|down|left|right) arrow", name)):
        return f"arrow pointing {f'{way[1]} and {way[2]}' if way[1] else way[2]}"
    if subcategory == "arrow" and (word := re.fullmatch(r"(back|end|on!|soon|top) arrow", name)):
        return f"arrow saying {word[1].rstrip('!')}"
    ends = ("sign", "symbol", "button", "bars", "mark", "infinity")
    if subcategory in ("warning", "transport-sign", "math") and not name.endswith(ends):
        return f"{name} sign"
    if name in (
        "om",
        "khanda",
        "yin yang",
        "cinema",
        "wireless",
        "vibration mode",
        "mobile phone off",
        "place of worship",
    ):
        return f"{name} symbol"
    return name


def _needs_none(phrase: str) -> bool:
    if phrase in _UNCOUNTED or phrase.startswith(("two ", "the ")):
        return True
    head = re.split(r" (?:with|of|in|on|for|behind|at|without|showing|saying|pointing|facing|[a-z]+ing) ", phrase)[0]
    last = head.split()[-1]
    return last in ("people", "men", "women") or (
        last.endswith("s") and last not in _SINGULAR_S and not last.endswith("ss")
    )


def _article(phrase: str) -> str:
    return f"an {phrase}" if _AN.match(phrase) and not _A.match(phrase) else f"a {phrase}"
