"""Words that the embedded tasks are made of: frequent ones, most of them a single token."""

from __future__ import annotations

import random


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def grouped(text: str) -> tuple[tuple[str, ...], ...]:
    """The forms of each word of a text, which are separated by slashes."""
    return tuple(tuple(forms.split("/")) for forms in text.split())


def one_of(rng: random.Random, templates: tuple[str, ...], **words: object) -> str:
    """One of the templates, filled."""
    return rng.choice(templates).format(**words)


NAMES = listed(
    "Anna Ben Carl Diana Emma Frank Grace Henry Irene Jack Karen Leo Maria Nora Oscar Paul Rosa Sam "
    "Tina Victor Walter Alice Bruno Clara David Ella George Helen Ivan Julia Kevin Laura Martin Nina "
    "Peter Rachel Simon Tom Vera Wendy"
)
SURNAMES = listed("lee brown stone hill wood king baker cook fisher mason potter carter page west ford lane")
OBJECTS = listed(
    "lamp table chair clock mirror bottle basket ladder carpet curtain hammer bucket blanket candle "
    "pillow guitar camera bicycle pencil notebook suitcase helmet kettle plate spoon towel drawer hook "
    "rope wheel tent drum piano magnet printer key coin ring button hammock jacket hat shoe glove bell "
    "flag map desk"
)
ANIMALS = listed(
    "dog cat horse cow pig sheep goat rabbit mouse tiger lion bear wolf fox deer monkey elephant zebra "
    "giraffe camel whale dolphin shark eagle owl duck goose chicken parrot penguin snake turtle frog "
    "lizard spider donkey squirrel beaver kangaroo crocodile"
)
FOODS = listed(
    "bread cheese butter rice pasta soup salad pizza apple banana orange grape lemon cherry peach pear "
    "carrot potato tomato onion garlic bean corn cake cookie chocolate honey yogurt egg ham sausage "
    "bacon mushroom spinach cabbage pumpkin strawberry mango noodle pancake"
)
COLOURS = listed("red blue green yellow black white brown pink purple grey orange gold")
SIZES = listed("big small tall tiny huge short wide narrow heavy light old new")
ACTIVITIES = (
    "visits the dentist",
    "plays chess",
    "cleans the garage",
    "goes swimming",
    "bakes bread",
    "meets the lawyer",
    "paints the fence",
    "takes a driving lesson",
    "returns the books",
    "works in the garden",
    "calls the bank",
    "cooks for the club",
    "repairs the roof",
    "sings in the choir",
    "buys new shoes",
    "teaches the children",
    "visits the museum",
    "washes the windows",
    "picks up the keys",
    "moves to a new flat",
)
# base form, past tense, -ing form; all of them take an object
VERBS = grouped(
    "carry/carried/carrying wash/washed/washing build/built/building sell/sold/selling hide/hid/hiding "
    "bring/brought/bringing find/found/finding paint/painted/painting fix/fixed/fixing "
    "throw/threw/throwing break/broke/breaking buy/bought/buying clean/cleaned/cleaning "
    "keep/kept/keeping lose/lost/losing move/moved/moving push/pushed/pushing drop/dropped/dropping "
    "hold/held/holding send/sent/sending take/took/taking draw/drew/drawing steal/stole/stealing "
    "choose/chose/choosing pull/pulled/pulling catch/caught/catching open/opened/opening "
    "borrow/borrowed/borrowing repair/repaired/repairing lift/lifted/lifting see/saw/seeing "
    "give/gave/giving bury/buried/burying tie/tied/tying copy/copied/copying test/tested/testing "
    "forget/forgot/forgetting leave/left/leaving use/used/using pack/packed/packing "
    "drag/dragged/dragging rent/rented/renting weigh/weighed/weighing"
)
# singular, plural
NOUNS = grouped(
    "wolf/wolves box/boxes child/children knife/knives city/cities bus/buses dish/dishes leaf/leaves "
    "mouse/mice foot/feet tooth/teeth man/men woman/women baby/babies lady/ladies story/stories "
    "fox/foxes glass/glasses church/churches watch/watches brush/brushes potato/potatoes "
    "tomato/tomatoes hero/heroes shelf/shelves wife/wives life/lives half/halves goose/geese "
    "country/countries party/parties factory/factories berry/berries butterfly/butterflies "
    "match/matches beach/beaches bench/benches class/classes dress/dresses boss/bosses key/keys "
    "boy/boys toy/toys day/days monkey/monkeys lamp/lamps chair/chairs clock/clocks road/roads "
    "river/rivers tree/trees house/houses horse/horses bird/birds book/books table/tables door/doors "
    "window/windows flower/flowers garden/gardens teacher/teachers doctor/doctors farmer/farmers "
    "king/kings ship/ships train/trains car/cars stone/stones ring/rings song/songs game/games "
    "school/schools bridge/bridges letter/letters picture/pictures"
)
# Every word occurs once, so each has one opposite.
OPPOSITES = grouped(
    "hot/cold big/small fast/slow heavy/light wet/dry hard/soft clean/dirty rich/poor strong/weak "
    "thick/thin wide/narrow deep/shallow full/empty open/closed high/low long/short loud/quiet "
    "early/late cheap/expensive rough/smooth tight/loose safe/dangerous old/new good/bad easy/difficult "
    "happy/sad right/wrong true/false public/private normal/strange"
)
PRAISE = listed("great excellent wonderful perfect fantastic lovely brilliant superb amazing delightful")
BLAME = listed("terrible awful useless horrible poor dreadful disappointing bad annoying miserable")
