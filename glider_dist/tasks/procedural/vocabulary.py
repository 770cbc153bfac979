"""Words that the embedded tasks are made of: frequent ones, most of them a single token."""

from __future__ import annotations

import random

NAMES = tuple(
    "Anna Ben Carl Diana Emma Frank Grace Henry Irene Jack Karen Leo Maria Nora Oscar Paul Rosa Sam Tina Victor "
    "Walter Alice Bruno Clara David Ella George Helen Ivan Julia Kevin Laura Martin Nina Peter Rachel Simon Tom "
    "Vera Wendy".split()
)
SURNAMES = tuple(
    "lee brown stone hill wood king baker cook fisher mason potter carter page west ford lane".split()
)
OBJECTS = tuple(
    "lamp table chair clock mirror bottle basket ladder carpet curtain hammer bucket blanket candle pillow guitar "
    "camera bicycle pencil notebook suitcase helmet kettle plate spoon towel drawer shelf rope wheel tent drum piano "
    "magnet battery key coin ring button scarf jacket hat shoe glove bell flag map box".split()
)
ANIMALS = tuple(
    "dog cat horse cow pig sheep goat rabbit mouse tiger lion bear wolf fox deer monkey elephant zebra giraffe camel "
    "whale dolphin shark eagle owl duck goose chicken parrot penguin snake turtle frog lizard spider donkey squirrel "
    "beaver kangaroo crocodile".split()
)
FOODS = tuple(
    "bread cheese butter rice pasta soup salad pizza apple banana orange grape lemon cherry peach pear carrot potato "
    "tomato onion garlic bean corn cake cookie chocolate honey yogurt egg ham sausage bacon mushroom spinach cabbage "
    "pumpkin strawberry mango noodle pancake".split()
)
COLOURS = tuple("red blue green yellow black white brown pink purple grey orange gold".split())
SIZES = tuple("big small tall tiny huge short wide narrow heavy light old new".split())
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
VERBS = tuple(
    tuple(forms.split("/"))
    for forms in (
        "carry/carried/carrying wash/washed/washing build/built/building sell/sold/selling hide/hid/hiding "
        "bring/brought/bringing find/found/finding paint/painted/painting fix/fixed/fixing throw/threw/throwing "
        "break/broke/breaking buy/bought/buying clean/cleaned/cleaning keep/kept/keeping lose/lost/losing "
        "move/moved/moving push/pushed/pushing drop/dropped/dropping hold/held/holding send/sent/sending "
        "take/took/taking draw/drew/drawing steal/stole/stealing choose/chose/choosing pull/pulled/pulling "
        "catch/caught/catching open/opened/opening borrow/borrowed/borrowing repair/repaired/repairing "
        "lift/lifted/lifting see/saw/seeing give/gave/giving bury/buried/burying tie/tied/tying "
        "copy/copied/copying test/tested/testing forget/forgot/forgetting leave/left/leaving use/used/using "
        "pack/packed/packing drag/dragged/dragging rent/rented/renting weigh/weighed/weighing"
    ).split()
)
# singular, plural
NOUNS = tuple(
    tuple(forms.split("/"))
    for forms in (
        "wolf/wolves box/boxes child/children knife/knives city/cities bus/buses dish/dishes leaf/leaves "
        "mouse/mice foot/feet tooth/teeth man/men woman/women baby/babies lady/ladies story/stories fox/foxes "
        "glass/glasses church/churches watch/watches brush/brushes potato/potatoes tomato/tomatoes hero/heroes "
        "shelf/shelves wife/wives life/lives half/halves goose/geese country/countries party/parties "
        "factory/factories berry/berries butterfly/butterflies match/matches beach/beaches bench/benches "
        "class/classes dress/dresses boss/bosses key/keys boy/boys toy/toys day/days monkey/monkeys lamp/lamps "
        "chair/chairs clock/clocks road/roads river/rivers tree/trees house/houses horse/horses bird/birds "
        "book/books table/tables door/doors window/windows flower/flowers garden/gardens teacher/teachers "
        "doctor/doctors farmer/farmers king/kings ship/ships train/trains car/cars stone/stones ring/rings "
        "song/songs game/games school/schools bridge/bridges letter/letters picture/pictures"
    ).split()
)
# Every word occurs once, so each has one opposite.
OPPOSITES = tuple(
    tuple(pair.split("/"))
    for pair in (
        "hot/cold big/small fast/slow heavy/light wet/dry hard/soft clean/dirty rich/poor strong/weak thick/thin "
        "wide/narrow deep/shallow full/empty open/closed high/low long/short loud/quiet early/late cheap/expensive "
        "rough/smooth tight/loose safe/dangerous old/new good/bad easy/difficult happy/sad right/wrong true/false "
        "public/private normal/strange"
    ).split()
)


def capitalised(text: str) -> str:
    """The text with a capital first letter and the rest as it was."""
    return text[0].upper() + text[1:]


def one_of(rng: random.Random, *options: str) -> str:
    """One of the sentences, each as likely."""
    return rng.choice(options)
