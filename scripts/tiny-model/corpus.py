"""Text for Baton's demo model: a seeded generator of stories and short chats.

This file knows a small world (creatures, people, places, objects, food and
what each is for) and a story grammar over it. A tale keeps track of who is
there, where they are, what they carry and how they feel, so that its sentences
agree with each other; while it writes, it also records questions whose answers
are true in that tale. Chats are built from the same tales, from plain facts of
the world, and from small talk.

Two choices matter for the model that learns from this. The sentences come from
many short templates over a wide word list, so that a few million parameters
can learn the grammar but cannot get by with memorising whole stories. And a
fixed eighth of all (hero, place, object) triples never appears in training, so
that held-out figures speak of combinations that were never seen.

All text here was written for this repository. The same seed gives the same
documents.
"""

import random
import re
import zlib

# --- the world -------------------------------------------------------------

# kind: (home, food, sound or None, young or None)
ANIMALS = {
    "fox": ("a den under the roots", "berries and eggs", "yips", "kit"),
    "rabbit": ("a warm burrow", "carrots and clover", None, "kit"),
    "bear": ("a deep cave", "honey and berries", "growls", "cub"),
    "mouse": ("a tiny hole in the wall", "seeds and cheese", "squeaks", "pup"),
    "owl": ("a hollow tree", "small bugs", "hoots", "owlet"),
    "hedgehog": ("a nest of dry leaves", "worms and snails", None, "hoglet"),
    "squirrel": ("a nest in the oak tree", "nuts and acorns", None, "kit"),
    "frog": ("a green pond", "flies", "croaks", "tadpole"),
    "duck": ("a nest in the reeds", "grass and bread crumbs", "quacks", "duckling"),
    "badger": ("a long tunnel", "roots and worms", None, "cub"),
    "otter": ("a home in the river bank", "fish", "whistles", "pup"),
    "cat": ("a cosy cottage", "fish and milk", "meows", "kitten"),
    "dog": ("a little wooden house", "meat and bones", "barks", "puppy"),
    "goat": ("a shed on the hill", "grass and leaves", "bleats", "kid"),
    "turtle": ("a quiet pool", "water plants", None, "hatchling"),
    "robin": ("a nest in the hedge", "worms and seeds", "sings", "chick"),
    "hen": ("a straw coop", "corn", "clucks", "chick"),
    "lamb": ("a green meadow", "grass", "bleats", None),
    "pony": ("a stable", "hay and apples", "neighs", "foal"),
    "beaver": ("a lodge of sticks", "bark", None, "kit"),
    "deer": ("a clearing in the woods", "leaves", None, "fawn"),
    "pig": ("a muddy pen", "corn and apples", "oinks", "piglet"),
    "crow": ("a nest in a tall pine", "seeds and crumbs", "caws", "chick"),
    "mole": ("a dark tunnel", "worms", None, "pup"),
    "wolf": ("a cave in the hills", "meat", "howls", "cub"),
    "cow": ("a big barn", "grass and hay", "moos", "calf"),
    "lion": ("the warm grassland", "meat", "roars", "cub"),
    "elephant": ("the warm grassland", "leaves and grass", "trumpets", "calf"),
    "monkey": ("the tall trees", "fruit", "chatters", "baby"),
    "penguin": ("a land of ice", "fish", None, "chick"),
    "horse": ("a stable", "hay and oats", "neighs", "foal"),
    "goose": ("a nest by the lake", "grass and corn", "honks", "gosling"),
    "swan": ("a nest by the lake", "water plants", None, "cygnet"),
    "parrot": ("the green jungle", "seeds and fruit", "talks", "chick"),
    "snail": ("a shell", "leaves", None, None),
    "ant": ("a nest under the ground", "crumbs and seeds", None, None),
    "bee": ("a hive", "nectar", "buzzes", None),
    "cricket": ("the tall grass", "leaves", "chirps", None),
    "dragon": ("a deep cave", "berries and warm bread", "roars", None),
}
HERO_ANIMALS = [a for a in ANIMALS if a not in ("wolf", "cow")]
PEOPLE = {
    "boy": "he", "girl": "she", "baker": "", "farmer": "", "fisherman": "he",
    "shepherd": "", "sailor": "", "gardener": "", "miller": "", "painter": "",
    "wizard": "he", "woodcutter": "", "musician": "", "tailor": "", "prince": "he", "princess": "she", "queen": "she", "king": "he",
    "teacher": "", "clockmaker": "",
}
# Most stories are about animals and children: grown-ups mostly help.
HERO_PEOPLE = ["boy", "girl", "boy", "girl", "baker", "farmer", "fisherman", "shepherd",
               "gardener", "prince", "princess", "painter", "sailor",
               "king", "queen", "wizard", "woodcutter", "musician", "teacher", "clockmaker", "miller", "tailor"]

HE_NAMES = ("Pip Tom Ben Max Sam Finn Leo Jack Oscar Hugo Toby Felix Otto Bruno Jasper Milo Rufus "
            "Barney Theo Arthur Ned Walter Oliver George Henry Alfie Dexter Basil Monty Gus Simon Peter Samuel Daniel "
            "Robin Ash Pebble Acorn Flint Rusty Bramble Patch Button Copper Biscuit Whisker Moss Storm Nutmeg Rowan Cedar Scout").split()
SHE_NAMES = ("Lily Mia Anna Rosie Daisy Clara Ruby Ella Molly Poppy Hazel Ivy Luna Nora Tilly Bella "
             "Alice Wren Maisie Penny Olive Flora Martha Emma Sophie Lucy Grace Willow Matilda Juno Sarah Hannah Julia Rose "
             "Clover Misty Sunny Snowdrop Pepper Fern Honey Maple Cherry Velvet Pearl Berry Primrose Dusty Feather Ginger Violet").split()

# key: (noun phrase, where one is, hiding spots)
PLACES = {
    "forest": ("the forest", "in the forest", ["behind a tall oak", "under a pile of leaves", "inside a hollow log"]),
    "river": ("the river", "by the river", ["under a flat stone", "among the reeds", "behind the willow tree"]),
    "village": ("the village", "in the village", ["behind the well", "beside the bakery", "under the old bench"]),
    "meadow": ("the meadow", "in the meadow", ["in the tall grass", "under a wild rose", "behind a grey rock"]),
    "hill": ("the hill", "on the hill", ["behind a grey rock", "under a thorn bush", "beside the stone wall"]),
    "beach": ("the beach", "on the beach", ["under the sea weed", "behind a sand dune", "inside an old boat"]),
    "farm": ("the farm", "on the farm", ["under the hay", "behind the barn", "beside the water trough"]),
    "garden": ("the garden", "in the garden", ["under the rose bush", "behind the shed", "inside a flower pot"]),
    "market": ("the market", "at the market", ["under the fruit stall", "behind a barrel", "beside the big scales"]),
    "castle": ("the castle", "at the castle", ["behind the long curtain", "under the stairs", "inside a dusty chest"]),
    "lake": ("the lake", "by the lake", ["under the wooden pier", "among the water lilies", "behind a fallen tree"]),
    "mountain": ("the mountain", "on the mountain", ["inside a small cave", "behind a pine tree", "under a ledge of rock"]),
    "bridge": ("the old bridge", "near the old bridge", ["under the stone arch", "between two planks", "behind the railing"]),
    "mill": ("the windmill", "near the windmill", ["behind the flour sacks", "under the ladder", "inside a wooden box"]),
    "harbour": ("the harbour", "at the harbour", ["under a fishing net", "behind a heap of rope", "inside an empty crate"]),
    "orchard": ("the orchard", "in the orchard", ["under an apple tree", "behind the ladder", "inside a basket of pears"]),
    "library": ("the library", "in the library", ["between two thick books", "under the reading table", "behind the tall shelf"]),
    "lighthouse": ("the lighthouse", "at the lighthouse", ["on the spiral stairs", "behind the big lamp", "under a coil of rope"]),
    "cave": ("the cave", "in the cave", ["behind a pointed stone", "under a heap of sand", "beside the dark pool"]),
    "island": ("the island", "on the island", ["under a palm tree", "behind a round rock", "inside a wet barrel"]),
    "school": ("the school", "at the school", ["under a desk", "behind the map on the wall", "inside the cupboard"]),
    "tower": ("the tower", "in the tower", ["behind the iron door", "under the narrow window", "beside the old loom"]),
    "well": ("the well", "near the well", ["inside the bucket", "behind the mossy stones", "under the little roof"]),
    "snow": ("the snowy field", "in the snowy field", ["under the soft snow", "behind the snowman", "beside the frozen stream"]),
}

# key: (adjectives, verb phrase "liked to ...", what it is for)
OBJECTS = {
    "ball": (["red", "blue", "bouncy"], "play with it", "to play games"),
    "kite": (["yellow", "paper", "striped"], "fly it high in the wind", "to fly in the wind"),
    "lantern": (["little", "bright", "brass"], "carry it at night", "to give light in the dark"),
    "drum": (["small", "round", "wooden"], "tap it all day", "to make music"),
    "flute": (["silver", "wooden", "thin"], "play soft songs on it", "to make music"),
    "scarf": (["warm", "green", "woolly"], "wear it on cold days", "to keep your neck warm"),
    "hat": (["tall", "straw", "purple"], "wear it in the sun", "to cover your head"),
    "book": (["thick", "old", "blue"], "read it before bed", "to read stories"),
    "map": (["old", "torn", "secret"], "study it for hours", "to find the way"),
    "key": (["golden", "rusty", "tiny"], "keep it in a safe pocket", "to open a lock"),
    "bell": (["silver", "brass", "little"], "ring it in the morning", "to call people"),
    "boat": (["toy", "wooden", "white"], "sail it on the water", "to cross the water"),
    "basket": (["big", "round", "straw"], "fill it with berries", "to carry things"),
    "blanket": (["soft", "warm", "blue"], "sleep under it", "to keep warm in bed"),
    "ring": (["golden", "shiny", "silver"], "look at it in the light", "to wear on a finger"),
    "coin": (["gold", "shiny", "old"], "spin it on the table", "to buy things"),
    "shell": (["pink", "white", "curly"], "listen to the sea in it", "to hear the sound of the sea"),
    "umbrella": (["red", "yellow", "big"], "carry it in the rain", "to stay dry in the rain"),
    "clock": (["old", "little", "round"], "listen to it tick", "to tell the time"),
    "paintbrush": (["thin", "soft", "new"], "paint flowers with it", "to paint pictures"),
    "mirror": (["round", "silver", "small"], "make funny faces in it", "to see your own face"),
    "rope": (["long", "strong", "thick"], "tie knots in it", "to tie and pull things"),
    "button": (["shiny", "green", "round"], "turn it over and over", "to close a coat"),
    "candle": (["white", "tall", "thick"], "light it in the evening", "to give light in the dark"),
    "violin": (["brown", "old", "fine"], "play slow tunes on it", "to make music"),
    "pencil": (["sharp", "short", "yellow"], "draw ships with it", "to write and draw"),
    "cup": (["blue", "tin", "painted"], "drink milk from it", "to drink from"),
    "teapot": (["round", "green", "china"], "make mint tea in it", "to make tea"),
    "sled": (["fast", "red", "wooden"], "ride it down the hill", "to ride on the snow"),
    "spoon": (["silver", "long", "wooden"], "stir soup with it", "to eat and stir soup"),
    "crown": (["paper", "golden", "shiny"], "wear it and play king", "to wear on your head"),
    "puppet": (["funny", "wooden", "little"], "make it dance", "to put on a show"),
    "wagon": (["red", "little", "wooden"], "pull it along the road", "to move heavy things"),
}

TRAITS = ["kind", "brave", "curious", "clever", "shy", "cheerful", "gentle", "proud", "quiet",
          "playful", "patient", "careful", "lazy", "honest", "hungry", "polite", "merry", "wise", "lively"]
FOODS = ["apple pie", "honey cake", "carrot soup", "warm bread", "berry jam", "nut biscuits",
         "pumpkin soup", "plum cake", "mushroom stew", "pear tart"]
INGREDIENTS = ["flour", "sugar", "butter", "milk", "honey", "eggs", "apples", "nuts", "berries", "salt"]
PLANTS = ["sunflower", "apple tree", "pumpkin", "rose", "bean plant", "tulip", "cherry tree", "carrot"]
COLOURS = ["red", "blue", "yellow", "green", "white", "purple", "orange", "pink"]

OPPOSITES = [tuple(p.split()) for p in (
    "hot cold|big small|tall short|fast slow|happy sad|light dark|wet dry|old new|hard soft|loud quiet|"
    "open closed|full empty|early late|up down|left right|day night|good bad|strong weak|rich poor|"
    "clean dirty|near far|high low|long short|heavy light|sweet sour|brave afraid|kind cruel|"
    "first last|inside outside|awake asleep|young old|thick thin|deep shallow|wide narrow|"
    "smooth rough|true false|begin end|push pull|give take|win lose|lost found|friend enemy").split("|")]
COLOUR_FACTS = [("the sky", "blue"), ("grass", "green"), ("snow", "white"), ("the sun", "yellow"),
                ("a carrot", "orange"), ("a strawberry", "red"), ("coal", "black"), ("a banana", "yellow"),
                ("a leaf in spring", "green"), ("milk", "white"), ("a plum", "purple"), ("a fox", "orange and white"),
                ("a frog", "green"), ("a crow", "black"), ("a pig", "pink"), ("a lemon", "yellow"),
                ("a pumpkin", "orange"), ("a cherry", "red"), ("the sea", "blue"), ("a mouse", "grey or brown")]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SEASONS = {"spring": "the flowers open and the birds build nests", "summer": "the sun is hot and the days are long",
           "autumn": "the leaves turn red and fall from the trees", "winter": "it is cold and the snow falls"}
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
GROUPS = {
    "animals": ["fox", "rabbit", "bear", "mouse", "owl", "frog", "duck", "cat", "dog", "goat", "deer", "pony"],
    "fruits": ["apple", "pear", "plum", "cherry", "banana", "lemon", "strawberry", "peach"],
    "colours": COLOURS, "birds": ["owl", "robin", "hen", "duck", "crow", "sparrow"],
    "flowers": ["rose", "tulip", "daisy", "sunflower", "lily"],
    "vegetables": ["carrot", "onion", "potato", "cabbage", "pumpkin", "bean"],
    "feelings": ["joy", "fear", "anger", "hope", "love", "pride"],
    "tools": ["hammer", "saw", "spade", "ladder", "rope", "brush"],
    "seasons": ["spring", "summer", "autumn", "winter"],
}
WORK = {"baker": ("bakes bread and cakes", "a bakery"), "farmer": ("grows food and looks after animals", "a farm"),
        "fisherman": ("catches fish", "a boat"), "shepherd": ("looks after sheep", "the hills"),
        "sailor": ("sails ships on the sea", "a ship"), "gardener": ("plants flowers and trees", "a garden"),
        "miller": ("grinds corn into flour", "a mill"), "painter": ("paints pictures", "a studio"),
        "teacher": ("helps children learn", "a school"), "clockmaker": ("makes and mends clocks", "a small shop"),
        "doctor": ("helps sick people get well", "a hospital"), "tailor": ("makes clothes", "a shop")}
UNKNOWN = ["What is the capital of France?", "Who won the football match?", "What is the price of gold?",
           "Write a program in Python.", "Who is the president?", "What is quantum physics?",
           "How do I fix my car?", "What is the news today?", "Translate this into German.",
           "How far is the moon?", "What is the weather like in London?", "Who wrote this famous song?",
           "How do computers work?", "What is the square root of two?", "Can you book a flight for me?",
           "Explain the law to me.", "Which phone should I buy?", "What is the stock market?",
           "Tell me about the history of Rome.", "How do I install Linux?",
           "How old is the universe?", "What time is it?", "Who invented the telephone?",
           "What is the largest country in the world?", "Can you drive a car?", "Do you know my address?"]


def held_out(kind, place, thing):
    """Whether this triple is kept out of training. Stable across runs."""
    return zlib.crc32(f"{kind}/{place}/{thing}".encode()) % 8 == 0


# --- small language tools --------------------------------------------------

CHOICE = re.compile(r"\[([^\[\]]*)\]")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou]|honest)")
# A sentence or a quotation starts here; a quotation that goes on ("but", "if") does not.
START = re.compile(r'([.!?] "?|\." |, "(?!but |if ))([a-z])')
LONE_I = re.compile(r"\bi\b")


def expand(rng, template, slots):
    """Pick one alternative of each [a|b|c], fill the slots, mend a/an and capitals."""
    while "[" in template:
        template = CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), template)
    text = template.format_map(slots)
    text = ARTICLE.sub(r"\1n ", text)
    text = START.sub(lambda m: m.group(1) + m.group(2).upper(), text)
    text = LONE_I.sub("I", text)
    for index, letter in enumerate(text):
        if letter.isalpha():
            return text[:index] + letter.upper() + text[index + 1 :]
    return text


# Said in other words now and then, so that one idea has several wordings.
OTHER_WORDS = [(re.compile(r"\b" + plain + r"\b", re.I), others.split("|")) for plain, others in (
    ("at last", "finally|in the end|after a long time"), ("(?-i:Soon)(?! after)", "before long|after a little while"), ("began to", "started to"),
    ("sad", "unhappy"), ("was very happy", "was full of joy"), ("everyone", "everybody"), ("nobody", "no one"),
    ("at once", "right away"), ("glad", "pleased"), ("every day", "each day"), ("shouted", "cried"),
    ("looked everywhere", "searched everywhere"), ("a small voice", "a tiny voice|a thin voice"), ("big smile", "wide smile"),
    ("thought and thought", "thought for a long time"), ("would not move", "did not move"), ("just then", "at that moment"),
    ("fell asleep", "went to sleep"), ("wonderful", "lovely"), ("ran home", "hurried home"), ("walked slowly", "went on slowly"),
    ("side by side", "hand in hand"), ("as good as new", "like new"), ("laughed out loud", "laughed with joy"),
    ("a heavy stone in", "a great weight on"), ("all day", "the whole day"), ("was proud of", "was very proud of"),
    ("cheered", "clapped and cheered"), ("set out", "set off"), ("worried", "troubled"), ("in tears", "crying"))]


def in_other_words(rng, text):
    for pattern, others in OTHER_WORDS:
        if rng.random() < 0.3:
            def swap(match):
                other = rng.choice(others)
                return other.capitalize() if match.group(0)[0].isupper() else other

            text = pattern.sub(swap, text)
    return text


def listing(words):
    return ", ".join(words[:-1]) + " and " + words[-1]


def a(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def invented_name(rng):
    """A name from syllables: the model must learn to copy names it never saw."""
    starts = "B C D F G H J K L M N P R S T V W Z Br Cr Dr Gr Tr Fl Pl Sk St Qu Th Sh".split()
    middles = "a e i o u ee oo ai".split()
    ends = "bo la mi ko ra to na li do zi nny mble ffin x n lo rin sy ster ck ll m r den wick tle by ndle lly rt p sk von dra sha".split()
    name = rng.choice(starts) + rng.choice(middles)
    if rng.random() < 0.3:
        name += rng.choice("lmnrst") + rng.choice(middles)
    return name + rng.choice(ends)


class Character:
    def __init__(self, rng, kind, taken, name=None, pronoun=None):
        self.kind = kind
        self.he = pronoun or PEOPLE.get(kind) or rng.choice(["he", "she"])
        while name is None or name in taken:
            if rng.random() < 0.35:
                name = invented_name(rng)
            else:
                name = rng.choice(HE_NAMES if self.he == "he" else SHE_NAMES)
        self.name = name
        taken.add(name)
        self.trait = rng.choice(TRAITS)

    def slots(self, prefix, name_key):
        he = self.he == "he"
        return {
            name_key: self.name, prefix + "Xhe": self.he.capitalize(), prefix + "k": self.kind, prefix + "he": self.he,
            prefix + "him": "him" if he else "her", prefix + "his": "his" if he else "her",
            prefix + "self": "himself" if he else "herself", prefix + "t": self.trait,
        }


class Tale:
    """One story in the making: who, where, what, and the text so far."""

    def __init__(self, rng, split, kind=None, place=None, thing=None, name=None, pronoun=None):
        self.rng = rng
        self.taken = set()
        while True:
            k = kind or rng.choice(HERO_ANIMALS if rng.random() < 0.72 else HERO_PEOPLE)
            p = place or rng.choice(list(PLACES))
            t = thing or rng.choice(list(OBJECTS))
            if held_out(k, p, t) == (split == "held-out") or (kind and place and thing):
                break
        self.split = split
        self.slots = {}
        self.paragraphs = [[]]
        self.questions = []
        self.episodes_done = []
        self.hero = Character(rng, k, self.taken, name, pronoun)
        self.slots.update(self.hero.slots("", "N"))
        self.set_place(p)
        self.set_thing(t)
        self.set_friend()
        self.set_helper()

    # State changes. Every one keeps the held-out triples out.
    def allowed(self, place, thing):
        return held_out(self.hero.kind, place, thing) == (self.split == "held-out")

    def set_place(self, key):
        self.place = key
        noun, where, spots = PLACES[key]
        self.slots.update(pl=noun, at=where)
        self.spots = spots

    def set_thing(self, key):
        self.thing = key
        adjectives, like, use = OBJECTS[key]
        adjective = self.rng.choice(adjectives)
        self.slots.update(o=f"{adjective} {key}", obj=key, like=like, use=use)

    def fresh_scene(self):
        for _ in range(50):
            place, thing = self.rng.choice(list(PLACES)), self.rng.choice(list(OBJECTS))
            if self.allowed(place, thing) and place != self.place and thing != self.thing:
                break
        self.set_place(place)
        self.set_thing(thing)

    def new_character(self, avoid):
        kinds = HERO_ANIMALS if self.hero.kind in ANIMALS or self.rng.random() < 0.5 else list(PEOPLE)
        kind = self.rng.choice([k for k in kinds if k not in avoid])
        return Character(self.rng, kind, self.taken)

    def set_friend(self):
        self.friend = self.new_character([self.hero.kind])
        self.slots.update(self.friend.slots("f", "F"))

    def set_helper(self):
        self.helper = self.new_character([self.hero.kind, self.friend.kind])
        self.slots.update(self.helper.slots("g", "G"))

    # Writing.
    def text_of(self, template, **more):
        return expand(self.rng, template, {**self.slots, **more})

    def say(self, *templates, **more):
        """Add one of the templates as the next sentence or sentences."""
        template = self.rng.choice(templates)
        if template.startswith("{N} ") and not template.startswith(("{N} the", "{N} was a", "{N} and")) and self.rng.random() < 0.18:
            template = "the {k}" + template[3:]
        self.paragraphs[-1].append(in_other_words(self.rng, self.text_of(template, **more)))

    def maybe(self, chance, *templates, **more):
        if self.rng.random() < chance:
            self.say(*templates, **more)

    def para(self, detail=True):
        """Start a new paragraph; within an episode, perhaps after a small detail."""
        if self.paragraphs[-1]:
            if detail:
                self.maybe(0.15, *DETAILS)
            self.paragraphs.append([])

    def ask(self, question, answer, **more):
        self.questions.append((self.text_of(question, **more), self.text_of(answer, **more)))

    def text(self):
        return "\n\n".join(" ".join(p) for p in self.paragraphs if p)


# Small things that can happen at any time in any place.
DETAILS = ["[a bird sang|a leaf fell|a cloud passed|a fly buzzed|a bell rang] far away.", "the [wind|air|light] was [soft|cool|strange|still].",
           "for a moment, [everything was quiet|nothing moved|nobody spoke].", "{N} [sighed|smiled a little|rubbed {his} eyes|looked up at the sky|scratched {his} head|sat very still].",
           "the sun [went behind a cloud|shone on the ground|was low in the sky].", "{he} thought of {his} [mother|father|warm bed|friends|supper].",
           "a [beetle|butterfly|small bird|spider] [went by|watched {him}|stopped and looked].", "time went by [slowly|quickly]."]


# --- openings and endings --------------------------------------------------


def opening(t):
    r = t.rng
    home_key = r.choice(list(PLACES))
    home = PLACES[home_key][1]
    if home_key in ("market", "castle", "library", "snow"):
        home = r.choice(["in a little village", "near the forest", "at the edge of the woods"])
    t.slots["home"] = home
    size = r.choice(["small", "little", "young", t.hero.trait, t.hero.trait, r.choice(["old", "tiny", "big", "tall", "round", "thin"])])
    if t.hero.kind in ANIMALS and r.random() < 0.15:
        size = r.choice(["brown", "grey", "white", "black", "golden", "spotted", "little brown", "small white", "big grey"])
    t.slots["doing"] = r.choice(["sitting in the sun", "sweeping the floor", "on the way home", "humming a tune", "looking for breakfast", "mending a chair",
                                 "watching the clouds", "washing a cup", "reading a letter", "eating an apple", "drinking a cup of tea", "looking out of the window"])
    if r.random() < 0.16:
        t.say("it was [early morning|late in the evening|a warm afternoon|a cold winter day|the first day of spring|the last day of summer|a quiet night|a rainy morning] {home}.",
              "the [sun|moon] was high over {home_noun}.", *[line + "." for line in SCENERY[home_key]], home_noun=PLACES[home_key][0])
        t.say("a {size} {k} named {N} was {doing}.", "{N}, a {size} {k}, was {doing}.", "{N} the {k} was {doing}.", "there sat a {size} {k} named {N}.", size=size)
        t.slots["home"] = home
    elif r.random() < 0.3:
        scene_opening(t, size)
    else:
        named_opening(t, size)
    about_hero(t)


def scene_opening(t, size):
    """Openings that start in the middle of things, as a reader's prompt may."""
    pronoun = t.rng.choice(["{he}", "{he}", "{N}"]).format_map(t.slots)
    t.say(
        "the [wind|rain|snow|sun|river|old road|night|forest|little town|sea] was [cold|loud|quiet|strong|gentle|dark|beautiful], and {N} the {k} was {doing}.",
        "[the wind blew hard|snow was falling|the sun was shining|the rain had stopped|the moon was bright|it was getting dark|the leaves were red|the stars were out], "
        "and [{N} the {k}|a {size} {k} named {N}|the {size} {k} {N}] was {doing}.",
        "[the old bridge|the road|the garden|the hill|the village|the little boat|the roof] was [covered with snow|wet with rain|white with frost|bright in the sun|full of mist|quiet and empty], "
        "and {N} the {k} [walked slowly|stood still|looked around|was {doing}].",
        "every [morning|evening|day|night|summer|winter], {N} the {k} [walked to the well|lit a small candle|sat by the window|sang a song|fed the birds|went to the market|looked at the sea].",
        "every [morning|evening|day], the {size} {k} [walked to the well|lit a small candle|sat by the window|sang a song|looked at the sea]. {his} name was {N}.",
        "{N} the {k} had never [seen the sea|been alone|left home|seen snow|met a dragon|slept outside|told a lie] before.",
        "there was once a {k} who [lived alone|had no friends|liked to sing|never laughed|wanted to see the world|was always late|could not sit still|loved the rain|was afraid of mice]. {his} name was {N}.",
        "it was the [night|day|morning|evening] before [the big race|the summer fair|the feast|{his} birthday|the first snow], and {N} the {k} [could not sit still|was very busy|was full of hope|was {doing}].",
        "{N} the {k} opened the [door|letter|box|window|gate] and [smiled|looked out|found a note|laughed|began to read|saw the snow].",
        "[grandmother|grandfather|mother|father|the old {k}] opened the [door|letter|box|window] and [called|smiled at|looked for|waved to] {N}, the {size} {k}.",
        "\"where is my {obj}?\" asked {N} the {k}. it was under the bed, as always.",
        "\"[wake up|come here|look at this|listen|wait for me]!\" called {N} the {k}.",
        "{N} and {F} were walking home. {N} was a {k}, and {F} was a {fk}.",
        "{N} and {F} were best friends. {N} was a {k} and {F} was a {fk}.",
        "deep in the [forest|mountains|woods|valley], a {size} {k} named {N} [woke up|was {doing}|lived in peace|had a small house].",
        "in a [village|town|house|castle|cottage] by the [sea|river|woods|lake|hills], there lived a {size} {k} named {N}.",
        "once, when the [world|moon|forest] was young, a {k} named {N} [went for a walk|built a house|made a wish].",
        "a {k} and a {fk} lived in the same [house|street|wood|valley]. the {k} was called {N}, and the {fk} was called {F}.",
        "the {size} {k} was [called|named] {N}.",
        "{N} was not like the other [{k}s|children|neighbours]. {he} was {t}." if t.hero.kind in ("fox", "rabbit", "bear", "owl", "frog", "duck", "cat", "dog", "pig", "crow", "hen", "dragon") else
        "{N} the {k} was not like the others. {he} was {t}.",
        size=size,
    )
    t.maybe(0.6, pronoun + " lived {home}.")
    if "lived" not in t.paragraphs[-1][-1] or "{home}" in t.paragraphs[-1][-1]:
        return
    if t.slots["home"] in t.paragraphs[-1][-1]:
        t.ask("Where does {N} live?", "{N} lives {home}.")


def named_opening(t, size):
    t.say(
        "once upon a time, a {size} {k} named {N} lived {home}.",
        "once upon a time, a {size} {k} named {N} lived {home}.",
        "once upon a time, there was a {size} {k} named {N}. {he} lived {home}.",
        "once upon a time, there was a {size} {k} [named|called] {N} who lived {home}.",
        "long ago, a {size} {k} called {N} lived {home}.",
        "there once was a {t} {k} named {N}. {he} lived {home}.",
        "{N} was a {t} {k} who lived {home}.",
        "{N} the {k} lived {home}.",
        "{home}, there lived a {size} {k} named {N}.",
        "far away, {home}, lived a {t} {k} named {N}.",
        "in a [quiet|faraway|green|sunny] land, there lived a {t} {k} named {N}. {his} home was {home}.",
        "there was once a {size} {k} named {N}. {he} lived {home}.",
        "a {size} {k} named {N} lived {home}.",
        "once there was a {t} {k} named {N}, who lived {home}.",
        "once upon a time, in a [faraway|quiet|green|little] land, there was a {size} {k} named {N}. {he} lived {home}.",
        "{N} and {F} were best friends. {N} was a {k}, and {F} was a {fk}. {N} lived {home}.",
        "it was a [cold|warm|bright|rainy|windy|quiet] [morning|evening|day] {home}, where a {k} named {N} lived.",
        "many years ago, a {size} {k} named {N} lived {home}.",
        "the {t} {k} {N} lived {home}.",
        "this is the story of {N}, a {size} {k} who lived {home}.",
        "have you heard of {N} the {k}? {Xhe} lived {home}.",
        "\"what a [lovely|fine|grey|cold] day!\" said {N}, a {size} {k} who lived {home}.",
        "\"good morning!\" said {N} the {k} to the sun. {he} lived {home}.",
        "nobody knew where the {k} came from, but everyone knew {his} name: {N}. {he} lived {home}.",
        "all alone {home} lived a {size} {k} named {N}.",
        "not so long ago, a {k} named {N} lived {home}.",
        size=size,
    )
    t.ask("Where does {N} live?", "{N} lives {home}.")


def about_hero(t):
    t.ask("[What kind of animal|What] is {N}?" if t.hero.kind in ANIMALS else "Who is {N}?", "{N} is a {k}.")
    t.ask("What is the name of the {k}?", "The name of the {k} is {N}.")
    t.maybe(
        0.75,
        "{he} was very {t}, and everyone [knew it|liked {him}|said so].",
        "{his} best friend was a {fk} named {F}.",
        "{he} had a good friend, a {fk} named {F}.",
        "{he} had [bright eyes|a soft voice|a big smile|a little red coat|warm brown eyes|a funny laugh] and a [kind|brave|merry|gentle] heart.",
        "{his} [mother|father|grandmother|grandfather|aunt|uncle] often told {him} to be [careful|kind|patient|brave|polite].",
        "in the [morning|evening], {he} liked to [watch the clouds|listen to the birds|walk in the rain|count the stars|sit by the fire].",
        "every morning, {he} [sang a song|swept the floor|looked at the sky|drank a cup of milk|opened the window] and smiled.",
        "{he} loved [long walks|warm days|good stories|quiet evenings|bright stars] more than anything.",
        "{he} was {t}, but {he} was also a little [lonely|shy|afraid of the dark|stubborn].",
        "the neighbours often came to visit {him}.",
    )


def day(t):
    """A sentence start that sets the time."""
    return t.text_of(
        "[one day|one morning|one sunny day|one cold morning|one afternoon|one rainy day|early one morning|"
        "one bright morning|one windy day|one spring day|one autumn day|one summer day|one winter morning|one fine day]")


def later_day(t):
    return t.text_of(
        "[the next day|the next morning|a few days later|a week later|some days later|not long after that|"
        "one day later|when the next week came|the following day|soon after that]")


MORALS = {
    "lost": ["a friend who helps you look is worth more than any treasure", "it is good to ask for help",
             "patience finds what hurry loses"],
    "cross": ["small steps can take you a long way", "two heads are better than one", "it is wise to try another way"],
    "fear": ["being brave means going on when you are afraid", "fear grows small when a friend is near"],
    "share": ["sharing makes a good thing better", "a kind word can end a quarrel", "things are more fun together"],
    "bake": ["many small gifts make a great feast", "those who share are never hungry"],
    "rescue": ["even the smallest friend can be a great help", "kindness always comes back"],
    "storm": ["it is wise to get ready before the storm", "a warm home is best when it is shared"],
    "race": ["slow and steady is better than quick and careless", "it is better to be kind than to win", "pride can make you slow"],
    "plant": ["good things need time", "patience is the best gardener"],
    "lonely": ["a smile is the start of a friendship", "everyone needs a friend"],
    "truth": ["it is always best to tell the truth", "an honest word makes the heart light"],
    "gift": ["the best gift comes from the heart", "it is happy to get, but happier to give"],
    "lost_way": ["it is wise to listen and look around", "a small light can show the way"],
    "treasure": ["the road is better than the treasure", "the best treasure is a good friend"],
    "learn": ["nobody is good at the start", "those who try again will learn"],
    "show": ["together we can do more than alone", "joy grows when it is shared"],
    "sleep": ["rest is as good as work", "a quiet song can calm a busy mind"],
}


def ending(t, theme):
    t.para(detail=False)
    t.slots["moral"] = moral = t.rng.choice(MORALS[theme])
    t.say(
        "from that day on, {N} [knew|remembered|understood] that {moral}.",
        "{N} learned that {moral}.",
        "and so {N} learned that {moral}.",
        "that night, {N} thought about the day. {he} knew now that {moral}.",
        "{N} never forgot that {moral}.",
        "and that is how {N} the {k} learned that {moral}.",
    )
    t.maybe(0.4, "the end.", "and they all lived happily ever after.", "then {he} closed {his} eyes and slept well.",
            "and everyone was [glad|happy].")
    t.ask("What [did {N} learn|is the moral of the story]?", "{N} learned that {moral}.")


SCENERY = {
    "forest": ["the trees were tall and green", "the leaves danced in the wind"], "river": ["the water ran fast and clear", "small fish jumped in the river"],
    "village": ["smoke rose from the chimneys", "the streets were full of people"], "meadow": ["the flowers were yellow and white", "bees buzzed over the grass"],
    "hill": ["the wind was fresh up there", "one could see the whole valley"], "beach": ["the waves rolled over the sand", "the sand was warm and white"],
    "farm": ["the cows were eating hay", "the rooster crowed on the fence"], "garden": ["the roses smelled sweet", "butterflies flew over the flowers"],
    "market": ["the stalls were full of fruit", "people called out their prices"], "castle": ["the flags waved on the towers", "the great gate was open"],
    "lake": ["the lake was as smooth as glass", "white swans swam on the water"], "mountain": ["there was snow on the top", "the air was thin and cold"],
    "bridge": ["the stones were old and mossy", "the water splashed below"], "mill": ["the great sails turned slowly", "white flour lay on everything"],
    "harbour": ["tall ships came and went", "it smelled of salt and fish"], "orchard": ["the apples were red and ripe", "the branches hung low with fruit"],
    "library": ["it was quiet, and it smelled of paper", "the shelves were full of books"], "snow": ["everything was white and still", "the snow was deep and soft"],
    "lighthouse": ["the great lamp turned round and round", "the sea was grey below"], "cave": ["water dripped from the roof", "it was dark and cool in there"],
    "island": ["green birds called from the trees", "the sea was blue on every side"], "school": ["the children were singing", "the bell had just rung"],
    "tower": ["the stairs went up and up", "a cold wind came in at the window"], "well": ["the water was deep and cold", "moss grew on the stones"],
}


def scenery(t, chance=0.3):
    t.maybe(chance, *[line + "." for line in SCENERY[t.place]])


# --- episodes --------------------------------------------------------------
# Each takes the tale and the words that set the time, and leaves the hero safe.


def meet_helper(t):
    t.say(
        "on the way, {he} met a {gk} named {G}.",
        "just then, a {gk} named {G} came by.",
        "soon {he} met {G} the {gk}.",
        "a {gt} {gk} named {G} was [sitting|resting|working] nearby.",
        "then {he} saw a {gk}. {ghis} name was {G}.",
    )
    t.ask("Who did {N} meet?", "{N} met a {gk} named {G}.")


def lost(t, when):
    t.say("{when}, {N} lost {his} {o} {at}.", "{when}, {N} could not find {his} {o}. {he} had left it {at}.",
          "{N} had a {o}. {he} liked to {like}. but {whenl}, the {obj} was gone!",
          "{N} loved {his} {o}. {when}, {he} went to play {at}, and the {obj} was lost.", when=when, whenl=when[0].lower() + when[1:])
    t.ask("What did {N} lose?", "{N} lost {his} {o}.")
    scenery(t)
    t.say("{he} was very [sad|worried|upset].", "{he} felt [sad|worried] and sat down.",
          "\"oh no!\" said {N}. \"where is my {obj}?\"", "\"where can it be?\" {he} asked.")
    spots = t.rng.sample(t.spots, 3)
    t.say("{he} looked {s0}, but it was not there.", "first {he} looked {s0}. it was not there.",
          "{he} searched {s0}, but {he} found [nothing|only dust|only a leaf|only an old shoe].", s0=spots[0])
    t.maybe(0.7, "then {he} looked {s1}, but {he} found only [leaves|stones|mud|a sleepy beetle|a grey feather].",
            "then {he} looked {s1}. it was not there either.", s1=spots[1])
    t.para()
    meet_helper(t)
    t.say("\"why are you [sad|crying]?\" asked {G}. \"i lost my {o},\" said {N}.",
          "\"what is wrong?\" asked {G}. \"i cannot find my {obj},\" said {N}.",
          "\"can you help me?\" asked {N}. \"i have lost my {o}.\"")
    t.say("\"do not worry,\" said {G}. \"[i will help you|we will look together|let us look again].\"",
          "\"let us look together,\" said {G}.")
    t.say("they looked {s2}, and there was the {o}!", "together they looked {s2}. there it was!",
          "{G} looked {s2} and found the {o}.", s2=spots[2])
    t.ask("Where was the {obj}?", "The {obj} was {s2}.", s2=spots[2])
    t.ask("Who helped {N}?", "{G} the {gk} helped {N}.")
    t.say("\"thank you!\" said {N}. {Xhe} was so happy that {he} [danced|jumped|laughed out loud|hugged {G}].",
          "{N} [hugged|thanked] {G} and held the {obj} tight.", "\"thank you, {G}!\" cried {N}. \"you are a true friend.\"")
    return "lost"


def cross(t, when):
    t.slots["goal"] = t.rng.choice(["visit {F} the {fk}", "bring a {o} to {F}", "see the summer fair", "pick sweet berries",
                                    "go home before dark"]).format_map(t.slots)
    t.slots["bar"] = bar = t.rng.choice(["wide stream", "deep river", "high wall", "muddy ditch", "dark tunnel", "fallen tree"])
    t.say("{when}, {N} wanted to {goal}.", "{when}, {N} set out to {goal}.", when=when)
    t.ask("What did {N} want to do?", "{N} wanted to {goal}.")
    t.say("but {at}, a {bar} was in the way.", "the road went past {pl}, and there a {bar} [blocked the way|stopped {him}].",
          "when {he} came to {pl}, {he} found a {bar} across the path.")
    scenery(t)
    t.ask("What was in the way?", "A {bar} was in the way.")
    t.say("first {he} tried to jump over it, but it was too [big|hard].", "{he} tried to climb over it, but {he} slipped and fell.",
          "{he} tried to go around it, but the path was too long.")
    t.maybe(0.6, "then {he} tried to push a big stone, but it would not move.", "{he} tried again, and again {he} failed.",
            "{he} sat down on a stone and thought hard.")
    t.para()
    meet_helper(t)
    t.say("\"i cannot get past the {bar},\" said {N}.", "\"how can i get to the other side?\" asked {N}.",
          "\"please help me,\" said {N}. \"i want to {goal}.\"" if "{F}" not in t.slots["goal"] else "\"please help me,\" said {N}.")
    tool, act = t.rng.choice([
        ("a long plank", "they laid the plank down and walked across it"),
        ("a strong rope", "they tied the rope to a tree and held on to it"),
        ("some flat stones", "they put the stones down one by one and stepped over them"),
        ("an old ladder", "they leaned the ladder against it and climbed up slowly"),
        ("a small lamp", "they lit the lamp and went on step by step"),
    ] if bar not in ("dark tunnel",) else [("a small lamp", "they lit the lamp and went through step by step"),
                                           ("a candle", "they lit the candle and walked through side by side")])
    t.say("{G} thought for a moment. \"we can use {tool},\" {ghe} said.", "\"i have {tool},\" said {G}. \"let us use it.\""
          if not tool.startswith("some") else "\"look, here are {tool},\" said {G}. \"let us use them.\"",
          "{G} smiled and brought {tool}.", tool=tool)
    t.say("{act}.", "so {act}.", "together, {act}." if not act.startswith("they") else "then {act}.", act=act)
    t.ask("What did they use?", "They used {tool}.", tool=tool)
    t.say("soon they were safe on the other side.", "at last {N} was on the other side.", "in the end, they both got across.")
    t.say("\"we did it!\" [cried|said] {N}.", "{N} thanked {G} and went on {his} way.", "{N} was [proud|glad|very happy].")
    return "cross"


def fear(t, when):
    what, truth = t.rng.choice([
        ("the dark", "the dark was full of bright stars"), ("thunder", "thunder was only a big noise"),
        ("deep water", "the water was cool and soft"), ("high places", "the view from up there was lovely"),
        ("the old house", "the old house was only dusty and empty"), ("loud noises", "the noise was only the wind in the door"),
        ("the shadow on the wall", "the shadow was only a coat on a hook")])
    t.slots.update(what=what, truth=truth)
    t.say("{N} was afraid of {what}.", "there was one thing {N} did not like: {what}.", "but {N} had a secret. {he} was afraid of {what}.")
    t.ask("What was {N} afraid of?", "{N} was afraid of {what}.")
    t.say("{when}, {his} {o} was left {at}, and {he} had to go and get it [alone|in the evening|at night].",
          "{when}, {he} had to go to {pl} to bring back a {o}.", when=when)
    t.say("{his} [legs shook|heart beat fast|knees felt weak].", "{he} wanted to run away.", "{he} stood still and did not dare to move.")
    t.para()
    t.say("{F} the {fk} took {his} [hand|arm] and said, \"i will go with you.\"", "\"take a deep breath,\" said {F} the {fk}. \"i am here.\"",
          "\"i am sometimes afraid too,\" said {F} the {fk}. \"let us go together.\"")
    t.ask("Who went with {N}?", "{F} the {fk} went with {N}.")
    t.say("step by step, they went on.", "{N} counted to three and took a step. then {he} took one more.", "{he} held {F} tight and walked slowly.")
    t.say("and then {N} saw that {truth}.", "after a while, {N} saw that {truth}.", "{N} opened {his} eyes. {truth}!")
    t.say("{he} was not afraid any more.", "{he} began to laugh. \"is that all?\" {he} said.", "\"i did it!\" said {N}. \"i am brave!\"")
    return "fear"


def share(t, when):
    t.say("{when}, {N} and {F} the {fk} found a {o} {at}.",
          "{when}, {N} was playing with {F} the {fk} {at}. they found a {o}.", when=when)
    t.ask("What did they find?", "They found a {o}.")
    t.ask("Where did they find the {obj}?", "They found the {obj} {at}.")
    scenery(t)
    t.say("\"it is mine!\" said {N}. \"no, it is mine!\" said {F}.", "\"i saw it first!\" shouted {N}. \"no, i did!\" shouted {F}.",
          "both of them wanted it, and soon they began to [quarrel|shout|argue].")
    t.say("they pulled and pulled until they both fell down.", "{N} turned away and would not speak.", "{F} went home in tears, and {N} was left alone with the {obj}.")
    t.say("the {obj} was [no fun|not nice] any more.", "{N} felt [sad|bad|sorry] inside.", "it grew very quiet.")
    t.para()
    t.maybe(0.6, "{G} the {gk} had seen it all. \"why not share it?\" {ghe} asked.",
            "{G} the {gk} shook {ghis} head. \"a {obj} is not worth a friend,\" {ghe} said.")
    t.say("{N} went to {F} and said, \"i am sorry. let us share it.\"", "\"i am sorry,\" said {N}. \"you can have it today, and i will have it tomorrow.\"",
          "\"please forgive me,\" said {N}. \"we can both use the {obj}.\"")
    t.say("\"i am sorry too,\" said {F}.", "{F} smiled. \"yes, let us share,\" {fhe} said.", "{F} wiped {fhis} eyes and nodded.")
    t.say("from then on, they shared the {o} and were friends again.", "they played with the {obj} together until the sun went down." if t.thing in ("ball", "kite", "boat", "drum", "wagon") else
          "they took turns with the {obj}, and both were happy.", "they laughed and went home side by side.")
    t.ask("Who did {N} quarrel with?", "{N} quarrelled with {F} the {fk}.")
    return "share"


def bake(t, when):
    food = t.rng.choice(FOODS)
    missing = t.rng.sample([i for i in INGREDIENTS if i.rstrip("s") not in food], 2)
    t.slots.update(food=food, m0=missing[0], m1=missing[1], was="were" if missing[0].endswith("s") else "was")
    t.say("{when}, {N} wanted to make {food} for {F} the {fk}.", "{when}, {N} said, \"i will make {food} for {F} the {fk}!\"",
          "{when}, {N} wanted to make {food} for the birthday of {F} the {fk}.", when=when)
    t.ask("What did {N} want to make?", "{N} wanted to make {food}.")
    t.say("but there {was} no {m0} in the [kitchen|cupboard|house].", "{he} looked in the cupboard, but there {was} no {m0}.")
    t.ask("What was missing?", "There {was} no {m0}.")
    t.say("so {he} went to {pl} with a {o}.", "so {N} walked to {pl} to look for some.", "so {he} asked everyone {at}.")
    meet_helper(t)
    t.say("\"do you have any {m0}?\" asked {N}.", "\"may i have some {m0}, please?\" asked {N}.")
    t.say("\"yes,\" said {G}, \"but i need some {m1}.\" luckily, {N} had {m1} at home, and they made a trade.",
          "\"of course,\" said {G}, and {ghe} gave {him} a bag of {m0}.", "\"i have more than enough,\" said {G}. \"take it, and come back soon.\"",
          "\"you can have it if you help me [carry water|sweep the yard|mend the fence],\" said {G}. so {N} helped {ghim}.")
    t.para()
    t.say("{N} ran home and began to [cook|stir|work].", "back home, {he} mixed everything in a big bowl.", "{he} washed {his} hands and lit the stove.")
    t.say("soon the house smelled [sweet|wonderful|of {food}].", "after an hour, the {food} was ready.")
    t.say("{F} took one bite and smiled. \"this is the best {food} in the world!\" {fhe} said.", "they sat at the table and ate until they were full.",
          "{N} shared it with {F} and {G}, and nothing was left but crumbs.")
    t.ask("Who was the {food} for?", "It was for {F} the {fk}.")
    return "bake"


def rescue(t, when):
    stuck = t.rng.choice(["in a deep hole", "in a fishing net", "under a heavy branch", "in a thorn bush", "on a high rock", "in the thick mud"])
    t.slots["stuck"] = stuck
    t.say("{when}, {N} heard a cry {at}.", "{when}, {N} was walking {at} when {he} heard a small voice.", when=when)
    scenery(t, 0.15)
    t.say("\"help! help!\" it called.", "\"please help me!\" cried the voice.")
    t.say("it was {G} the {gk}. {ghe} was stuck {stuck}.", "a {gk} named {G} was stuck {stuck}.")
    t.ask("Who was stuck?", "{G} the {gk} was stuck {stuck}.")
    t.say("\"do not be afraid,\" said {N}. \"i will get you out.\"", "\"hold on!\" said {N}. \"i am coming.\"")
    t.say("{N} pulled with all {his} might, but it did not work.", "{he} tried to reach {ghim}, but {he} was too [short|weak].", "{he} tried once, and {he} tried twice.")
    t.para()
    t.say("then {he} ran to get {F} the {fk}, and they pulled together.", "then {he} had an idea. {he} used {his} {o} to help.",
          "\"we need more help,\" said {N}, and {he} called {F} the {fk}.")
    t.say("one, two, three, and {G} was free!", "at last, {G} was free.", "slowly, very slowly, {G} came out.")
    t.say("\"you saved me,\" said {G}. \"i will never forget it.\"", "\"thank you,\" said {G}. \"one day i will help you too.\"", "{G} was tired but safe. {ghe} thanked {N} again and again.")
    t.maybe(0.5, "some days later, {N} was lost in the fog, and it was {G} who showed {him} the way home.",
            "the next winter, {N} had no food, and it was {G} who brought {him} a [basket of nuts|loaf of bread|pot of soup].")
    return "rescue"


def storm(t, when):
    t.say("{when}, dark clouds came over {pl}.", "{when}, the wind began to blow hard {at}.", "{when}, {N} saw black clouds in the sky.", when=when)
    t.say("\"a storm is coming,\" said {N}.", "\"we must hurry,\" said {N}. \"a storm is near.\"")
    t.ask("What was coming?", "A storm was coming.")
    t.say("{he} [brought in the wood|closed the windows|tied down the roof] and filled a [jar|jug] with water.", "{he} worked all day to make {his} home strong.",
          "{he} put {his} {o} in a safe place and shut the door.")
    t.say("{F} the {fk} only laughed. \"it is just a little wind,\" {fhe} said.", "{F} the {fk} was too [lazy|busy|sleepy] to get ready.")
    t.para()
    t.say("that night, the rain fell and the thunder roared.", "then the storm came. the trees bent and the rain poured down.")
    t.say("there was a knock at the door. it was {F}, wet and cold.", "in the middle of the night, {F} came to the door. {fhis} home was full of water.")
    t.ask("Who came to the door?", "{F} the {fk} came to the door.")
    t.say("\"come in,\" said {N}. \"there is room for two.\"", "{N} opened the door at once and gave {fhim} a warm blanket.", "\"you can stay with me,\" said {N}.")
    t.say("they drank [hot tea|warm milk|hot soup] and told stories until the storm was over.", "in the morning, the sky was blue, and they mended {F}'s home together.",
          "\"next time i will listen to you,\" said {F}.")
    return "storm"


def race(t, when):
    prize = t.slots["o"]
    t.say("{when}, there was a race {at}. the prize was a {prize}.", "{when}, everyone came to {pl} for the big race. the winner would get a {prize}.", when=when, prize=prize)
    scenery(t)
    t.ask("What was the prize?", "The prize was a {prize}.", prize=prize)
    t.say("{F} the {fk} was very fast. \"nobody can beat me,\" {fhe} said.", "\"i will win,\" said {F} the {fk}. \"you are too slow, {N}.\"")
    t.say("{N} said nothing, but {he} made up {his} mind to try.", "\"i will do my best,\" said {N}.")
    t.say("the race began. {F} ran ahead like the wind.", "\"one, two, three, go!\" called {G} the {gk}. {F} was soon far ahead.")
    t.para()
    if t.rng.random() < 0.6:
        t.say("but {F} stopped to [rest under a tree|eat some berries|look at {fhis} face in a pool] and fell asleep.", "half way, {F} sat down and began to [dream|doze].")
        t.say("{N} went on, step by step, and did not stop.", "{N} kept going, slow and steady.")
        t.say("when {F} woke up, {N} was already at the end. {N} had won!", "at last, {N} crossed the line first.")
        t.ask("Who won the race?", "{N} the {k} won the race.")
        t.say("\"well done,\" said {F}. \"i was too proud.\"", "{F} was ashamed, but {N} shook {fhis} hand and smiled.")
    else:
        t.say("but then {F} tripped over a root and hurt {fhis} leg.", "half way, {F} fell and could not get up.")
        t.say("{N} could have won. but {he} stopped to help {fhim}.", "{N} stopped at once. \"lean on me,\" {he} said.")
        t.say("they walked over the line together, and everyone cheered.", "they came in last, arm in arm, and the crowd clapped for them.")
        t.ask("Why did {N} stop?", "{N} stopped to help {F}.")
        t.say("{F} said, \"you are the real winner.\"", "the prize went to {N} for {his} kind heart.")
    return "race"


def plant(t, when):
    plant_name = t.rng.choice(PLANTS)
    t.slots["plant"] = plant_name
    t.say("{when}, {G} the {gk} gave {N} a seed.", "{when}, {N} found a tiny seed {at}.", "{when}, {N} bought a seed for one small coin.", when=when)
    t.say("\"i will grow a {plant},\" said {N}.", "\"what will it be?\" {he} asked. {he} hoped for a {plant}.")
    t.ask("What did {N} grow?", "{N} grew a {plant}.")
    t.say("{he} dug a hole {at} and put the seed in the ground.", "{he} planted it {at} and gave it some water.")
    t.say("every day {he} looked, but nothing grew.", "the first week nothing came up. the second week nothing came up.")
    t.maybe(0.6, "\"it will never grow,\" laughed {F} the {fk}.", "\"be patient,\" said {F} the {fk}. \"it is sleeping.\"")
    t.say("but {N} did not give up. {he} [pulled the weeds|brought water|sang to it] every day.", "{N} waited and took good care of it.")
    t.para()
    t.say("then, one warm morning, a small green leaf came out of the ground.", "at last, after the rain, a green shoot came up.")
    t.say("it grew and grew until it was a fine {plant}.", "by the end of summer, it was the best {plant} anyone had seen.")
    t.say("everyone came to see it, and {N} was very proud.", "{N} shared it with all {his} friends.", "\"it was worth the wait,\" said {N}.")
    return "plant"


def lonely(t, when):
    # A lonely hero cannot already know the friend who is met here.
    if t.friend.name in t.text():
        t.set_friend()
    t.say("{when}, {N} came to a new home near {pl}. {he} knew nobody there.", "{when}, {N} sat alone {at}. {he} had nobody to play with.", when=when)
    t.say("{he} felt very lonely.", "{he} watched the others play and sighed.", "\"i wish i had a friend,\" {he} said.")
    t.ask("How did {N} feel?", "{N} felt lonely.")
    t.say("{he} wanted to say hello, but {he} was too shy.", "{he} tried to speak, but the words would not come out.")
    t.para()
    t.say("then {he} saw {F} the {fk}. {fhe} was alone too.", "one of them was {F}, a {ft} {fk}. {fhe} had a {o}.", "nearby, {F} the {fk} was trying to carry a heavy {obj}.")
    t.say("\"hello,\" said {N} in a small voice. \"may i [help you|sit here|play with you]?\"", "{N} took a deep breath and said, \"hello, my name is {N}.\"")
    t.say("\"yes, please!\" said {F} with a big smile.", "{F} smiled. \"i hoped you would ask,\" {fhe} said.")
    t.say("they played {at} until the stars came out.", "they talked and laughed all afternoon.", "{N} showed {F} {his} {o}, and they played all day.")
    t.ask("Who became {N}'s friend?", "{F} the {fk} became {N}'s friend.")
    t.say("{N} was not lonely any more.", "after that, they met every day.", "that night {N} went to bed with a happy heart.")
    return "lonely"


def truth(t, when):
    t.say("{F} the {fk} had a {o}. {when}, {N} was playing with it {at} and broke it.",
          "{when}, {N} took the {o} of {F} the {fk} without asking and broke it.", when=when)
    t.ask("What did {N} break?", "{N} broke {F}'s {o}.")
    t.say("{he} was afraid, so {he} hid the pieces {spot}.", "nobody had seen it. {he} hid it {spot} and ran away.", spot=t.rng.choice(t.spots))
    t.say("soon {F} the {fk} came. \"have you seen my {obj}?\" {fhe} asked.", "{F} the {fk} looked everywhere. \"who took my {obj}?\" {fhe} asked.")
    t.say("\"no,\" said {N}, and {his} face grew hot.", "\"maybe {G} the {gk} took it,\" said {N}, and {he} looked at the ground.")
    t.para()
    t.say("that night {N} could not sleep.", "all day {N} felt a heavy stone in {his} heart.", "{N} could not eat and could not play.")
    t.say("in the morning, {he} went to {F} and told {fhim} the truth.", "\"i must tell you something,\" {he} said to {F} at last. \"i broke your {obj}. i am sorry.\"")
    t.say("{F} was sad, but {fhe} was not angry. \"thank you for telling me,\" {fhe} said.", "\"i am glad you told me,\" said {F}. \"we can mend it.\"")
    t.say("together they mended the {obj}.", "they fixed it with [glue|string|a little paint], and it was almost as good as new.", "{N} worked for a week and bought {fhim} a new {obj}.")
    return "truth"


def gift(t, when):
    t.say("{when}, {N} wanted to give {F} the {fk} a gift.", "{when}, it was the birthday of {F} the {fk}, and {N} had no gift for {fhim}.", when=when)
    t.say("\"what does {fhe} like?\" {N} wondered.", "{he} thought and thought.")
    t.say("{he} went to {pl} and saw a {o}, but it cost too much.", "{at}, {he} saw a {o}. but {he} had no money.")
    scenery(t, 0.2)
    t.ask("What did {N} see?", "{N} saw a {o}.")
    meet_helper(t)
    t.say("\"if you help me [pick apples|carry the bags|paint the fence|clean the shop], i will give you the {obj},\" said {G}.",
          "\"i can give you the {obj},\" said {G}, \"if you [sing me a song|tell me a story|help me today].\"")
    t.say("{N} worked hard until [noon|the evening|the sun went down].", "{N} did it with a smile.")
    t.para()
    t.say("{G} kept {ghis} word and gave {him} the {o}.", "\"you have earned it,\" said {G}, and gave {him} the {o}.")
    t.say("{N} ran to {F} and gave {fhim} the {obj}.", "{he} tied a ribbon on it and took it to {F}.")
    t.say("\"for me?\" asked {F}. {fXhe} was so happy that {fhe} cried.", "\"it is just what i wanted,\" said {F}, and {fhe} hugged {N}.")
    t.ask("Who got the {obj}?", "{F} the {fk} got the {obj}.")
    return "gift"


def lost_way(t, when):
    t.say("{when}, {N} followed a [blue butterfly|bright bird|strange sound|sweet smell] and went too far {at}.", "{when}, {N} went to {pl} alone and lost {his} way.", when=when)
    scenery(t)
    t.say("everything looked the same.", "\"which way is home?\" {he} asked.", "it was getting dark, and {he} did not know the way back.")
    t.say("{he} walked to the left, but the path ended.", "{he} called for help, but nobody answered.", "{he} walked in a circle and came back to the same tree.")
    t.para()
    meet_helper(t)
    t.say("\"are you lost?\" asked {G}. \"yes,\" said {N}. \"i want to go home.\"", "\"i know the way,\" said {G}. \"come with me.\"")
    t.say("{G} lit a little lamp, and they walked side by side.", "{G} showed {him} a bright star, and they followed it.", "{G} gave {him} a {o} and walked with {him}.")
    t.say("soon {N} saw the light of {his} own window.", "at last, {N} saw {his} home, and {F} the {fk} was waiting at the door.")
    t.ask("Who showed {N} the way?", "{G} the {gk} showed {N} the way.")
    t.say("\"i was so worried,\" said {F}." if "{F}" in t.paragraphs[-1][-1] else "\"thank you for your help,\" said {N}.", "{he} thanked {G} and went inside.", "\"home is the best place of all,\" said {N}.")
    return "lost_way"


def sleep(t, when):
    t.say("{when}, {N} could not sleep.", "{when}, {N} went to bed, but {he} was not tired at all.", when=when.replace("morning", "night").replace("day", "night") if "day" in when or "morning" in when else when)
    t.say("{he} turned to the left. {he} turned to the right.", "{he} counted [sheep|stars|apples], but it did not help.")
    t.say("so {he} got up and went to {F} the {fk}.", "\"i cannot sleep,\" {he} said to {F} the {fk}.")
    t.say("{F} gave {him} a cup of [warm milk|honey tea].", "{F} gave {him} a soft pillow to hold.", "{F} lit a small candle and sat down by {him}.")
    t.para()
    t.say("then {F} told {him} about {pl}, where the [wind|moon|water] sings all night.", "then {F} sang a soft song about the moon and {pl}.")
    t.ask("What did {F} sing or tell about?", "It was about {pl}.")
    t.say("{N} listened. {his} eyes grew heavy.", "little by little, {N} grew quiet.")
    t.say("before the end, {he} was fast asleep.", "soon {N} was dreaming of [stars|the sea|sweet berries|tall ships].")
    return "sleep"


def treasure(t, when):
    t.say("{when}, {N} found an old map {spot} {at}.", "{when}, {G} the {gk} gave {N} an old map of {pl}.", when=when, spot=t.rng.choice(t.spots))
    t.say("there was a red cross on it. \"a treasure!\" said {N}.", "\"it shows a treasure!\" cried {N}.")
    t.say("{he} showed it to {F} the {fk}, and they set out together.", "{he} asked {F} the {fk} to come along.")
    t.ask("Who went with {N}?", "{F} the {fk} went with {N}.")
    t.slots["count"] = t.rng.choice(["ten", "twenty", "thirty", "forty", "seven"])
    t.say("they counted {count} steps to the [north|south|east|west] and began to dig.", "they walked {count} steps from the [big tree|old wall|round stone] and dug a hole.")
    scenery(t)
    t.maybe(0.5, "they dug until their arms hurt.", "first they found only stones.", "\"there is nothing here,\" said {F}. but {N} did not stop.")
    t.para()
    t.say("at last, they found a small box. inside was a {o}.", "then something shone in the ground. it was a box with a {o} in it.")
    t.ask("What was in the box?", "A {o} was in the box.")
    t.say("\"it is not gold,\" said {F}, \"but it is ours.\"", "{N} laughed. \"this is better than gold,\" {he} said.", "they were so happy that they sang all the way home.")
    t.say("they kept the {obj} in a safe place and told everyone about the day.", "they took the {obj} home and shared it.")
    return "treasure"


def learn(t, when):
    skill, advice = t.rng.choice([("swim", "kick with your legs and breathe"), ("read", "look at one letter at a time"), ("dance", "listen to the music and count"),
                                  ("paint", "look first and paint later"), ("whistle", "make your mouth round and blow"), ("skate", "bend your knees and look ahead"),
                                  ("sing", "breathe in and open your mouth wide"), ("juggle", "start with one ball, then take two")])
    t.slots.update(skill=skill, advice=advice)
    t.say("{when}, {N} saw {F} the {fk} {skill} {at}.", "{N} could not {skill}. {when}, {he} saw {F} the {fk} do it {at}.", when=when)
    t.say("\"i want to {skill} too,\" {he} said.", "\"i wish i could {skill} like that,\" said {N}.")
    t.ask("What did {N} want to learn?", "{N} wanted to learn to {skill}.")
    t.say("{he} tried, but it went all wrong.", "the first try was bad, and the second was worse.", "{he} tried, and everyone laughed.")
    t.say("\"i will never learn it,\" {he} said and [sat down|hung {his} head].", "{he} was ready to give up.")
    t.para()
    t.say("\"i could not do it at first,\" said {F}. \"{advice}.\"", "\"let me show you,\" said {F}. \"{advice}.\"")
    t.ask("What did {F} say?", "{F} said, \"{advice}.\"")
    t.say("so {N} tried again every day, a little in the morning and a little in the evening.", "{N} nodded and tried again, and again, and again.")
    t.say("after a week, {he} could {skill} a little. after a month, {he} could {skill} very well.", "then, one day, it worked. {N} could {skill}!")
    t.say("\"look at me!\" {he} called, and {F} clapped.", "{F} was proud of {him}, and {N} gave {fhim} a {o} to say thank you.")
    return "learn"


def show(t, when):
    t.say("{when}, {N} and {F} the {fk} wanted to put on a show {at}.", "{when}, {N} said to {F} the {fk}, \"let us put on a show!\"", when=when)
    t.slots["part"] = t.rng.choice(["sing a song", "do a dance", "tell a funny story", "play a tune", "read a poem"])
    t.say("{N} would {part}, and {F} would [beat the drum|open the curtain|hold the lamp].", "\"i will {part},\" said {N}.")
    t.ask("What did {N} want to do in the show?", "{N} wanted to {part}.")
    t.say("they worked for days. they painted a sign and made a stage from old boxes.", "they told everyone {at} and put up a big sign.")
    t.say("but when the evening came, {N} saw all the faces and could not say a word.", "but just before the show, the rain began to fall.", "but the {o} they needed was broken.")
    t.para()
    t.say("{F} stood next to {him} and [smiled|nodded]. \"we will do it together,\" {fhe} said.", "\"do not worry,\" said {G} the {gk}. \"you can use my {obj}, and my barn is dry.\"")
    t.say("so they began, and soon everyone was [laughing|clapping|singing along].", "then {N} began, and {his} voice was clear and strong.")
    t.say("at the end, the people threw flowers.", "when it was over, everyone called, \"more, more!\"", "it was the best show of the year.")
    return "show"


EPISODES = [lost, lost, treasure, learn, show, cross, fear, share, bake, rescue, storm, race, plant, lonely, truth, gift, lost_way, sleep]


def story(rng, split, episodes=1, **given):
    """Write a whole tale; with several episodes it becomes a long story."""
    t = Tale(rng, split, **given)
    opening(t)
    order = rng.sample(sorted(set(EPISODES), key=lambda e: e.__name__), episodes) if episodes > 1 else [rng.choice(EPISODES)]
    theme = None
    for number, episode in enumerate(order):
        if number:
            t.para(detail=False)
            t.fresh_scene()
            t.set_helper()
        when = day(t) if number == 0 else later_day(t)
        theme = episode(t, when)
        t.theme = theme
        if number and rng.random() < 0.3:
            t.say("{N} was glad that {F} was {his} friend.", "what a day it was!", "that evening, {N} told {F} all about it.")
    ending(t, theme)
    return t


# --- chats -----------------------------------------------------------------

SYSTEMS = ["You are a helpful assistant.", "You are a friendly storyteller.", "You tell short stories.",
           "You are a kind teacher. Answer in simple words.", "You are a helpful story model.", "Answer the questions of the user.",
           "You are a small model that tells stories."]


def e(rng, template, **slots):
    return expand(rng, template, slots)


def plain_fact(rng):
    """A question about the world and its answer."""
    kind = rng.randrange(15)
    if kind == 0:
        x, y = rng.choice(OPPOSITES)
        if rng.random() < 0.5 and (x, y) not in [("heavy", "light"), ("long", "short"), ("young", "old")]:
            x, y = y, x
        x, y = {("short", "long"): ("long", "short")}.get((x, y), (x, y))
        return (e(rng, "[What is the opposite of {x}?|Tell me the opposite of {x}.|What is the opposite of the word {x}?]", x=x),
                e(rng, "The opposite of {x} is {y}.", x=x, y=y))
    if kind == 1:
        x, c = rng.choice(COLOUR_FACTS)
        return e(rng, "What colour is {x}?", x=x), e(rng, "{x} is {c}.", x=x, c=c)
    if kind == 2:
        x = rng.choice([k for k, v in ANIMALS.items() if v[2]])
        return (e(rng, "[What sound does a {x} make?|What does a {x} say?]", x=x), e(rng, "A {x} {s}.", x=x, s=ANIMALS[x][2]))
    if kind == 3:
        x = rng.choice(list(ANIMALS))
        return e(rng, "[Where does a {x} live?|What is the home of a {x}?]", x=x), e(rng, "A {x} lives in {h}.", x=x, h=ANIMALS[x][0])
    if kind == 4:
        x = rng.choice(list(ANIMALS))
        return e(rng, "What does a {x} [eat|like to eat]?", x=x), e(rng, "A {x} eats {h}.", x=x, h=ANIMALS[x][1])
    if kind == 5:
        x = rng.choice([k for k, v in ANIMALS.items() if v[3]])
        return e(rng, "[What is a baby {x} called?|What do you call a baby {x}?]", x=x), e(rng, "A baby {x} is called a {y}.", x=x, y=ANIMALS[x][3])
    if kind == 6:
        i = rng.randrange(7)
        if rng.random() < 0.6:
            return f"[What|Which] day comes after {DAYS[i]}?".replace("[What|Which]", rng.choice(["What", "Which"])), f"{DAYS[(i + 1) % 7]} comes after {DAYS[i]}."
        return f"What day comes before {DAYS[i]}?", f"{DAYS[i - 1]} comes before {DAYS[i]}."
    if kind == 7:
        i = rng.randrange(12)
        return f"What month comes after {MONTHS[i]}?", f"{MONTHS[(i + 1) % 12]} comes after {MONTHS[i]}."
    if kind == 8:
        s = rng.choice(list(SEASONS))
        return f"What happens in {s}?", f"In {s}, {SEASONS[s]}."
    if kind == 9:
        i, j = rng.randrange(0, 11), rng.randrange(0, 10)
        if rng.random() < 0.6:
            return f"What is {NUMBERS[i]} plus {NUMBERS[j]}?", f"{NUMBERS[i].capitalize()} plus {NUMBERS[j]} is {NUMBERS[i + j]}."
        return f"What number comes after {NUMBERS[i + j]}?" if i + j < 20 else "What number comes after nine?", (f"{NUMBERS[i + j + 1].capitalize()} comes after {NUMBERS[i + j]}." if i + j < 20 else "Ten comes after nine.")
    if kind == 10:
        o = rng.choice(list(OBJECTS))
        return e(rng, "[What is a {o} for?|What do you use a {o} for?|What can you do with a {o}?]", o=o), e(rng, "You use a {o} {u}.", o=o, u=OBJECTS[o][2])
    if kind == 11:
        g = rng.choice(list(GROUPS))
        return e(rng, "[Name three {g}.|Can you name three {g}?|Tell me three {g}.]", g=g), e(rng, "Three {g} are {l}.", g=g, l=listing(rng.sample(GROUPS[g], 3)))
    if kind == 12:
        w = rng.choice(list(WORK))
        if rng.random() < 0.6:
            return e(rng, "What does a {w} do?", w=w), e(rng, "A {w} {x}.", w=w, x=WORK[w][0])
        return e(rng, "Where does a {w} work?", w=w), e(rng, "A {w} works in {x}.", w=w, x=WORK[w][1]).replace("in a farm", "on a farm")
    if kind == 13:
        g, h = rng.choice(["animals", "fruits", "flowers", "vegetables", "birds", "colours"]), rng.choice(["animals", "fruits", "flowers", "vegetables"])
        x = rng.choice(GROUPS[g])
        one = h[:-1]
        yes = x in GROUPS[h] or (g == "birds" and h == "animals")
        if g == "colours" and h != "colours" and x in ("orange", "pink", "purple"):
            x = "red"
        thing = x if g == "colours" else a(x)
        real = g[:-1] if g != "birds" else "bird"
        return (e(rng, "Is {x} a {h}?", x=thing, h=one),
                e(rng, "Yes, {x} is a {h}." if yes else "No, {x} is a {r}.", x=thing, h=one, r=real))
    w = rng.choice([("How many days are in a week?", "There are seven days in a week."), ("How many months are in a year?", "There are twelve months in a year."),
                    ("How many legs does a dog have?", "A dog has four legs."), ("How many legs does a bird have?", "A bird has two legs."),
                    ("How many seasons are there?", "There are four seasons: spring, summer, autumn and winter."), ("What falls from the clouds?", "Rain falls from the clouds."),
                    ("When do the stars shine?", "The stars shine at night."), ("When does the sun rise?", "The sun rises in the morning."),
                    ("Where do fish live?", "Fish live in the water."), ("What do bees make?", "Bees make honey."), ("Where does milk come from?", "Milk comes from cows."),
                    ("What is ice?", "Ice is frozen water."), ("What do birds build?", "Birds build nests."), ("What is bread made of?", "Bread is made of flour, water and salt."),
                    ("What do you do when you are tired?", "When you are tired, you go to bed and sleep."), ("What do you do when it rains?", "When it rains, you take an umbrella."),
                    ("What is a friend?", "A friend is someone who is kind to you and helps you."), ("What is a forest?", "A forest is a place with many trees."),
                    ("What is a village?", "A village is a small place where people live together."), ("What is courage?", "Courage means going on when you are afraid."),
                    ("Why should we share?", "We should share because things are more fun together."), ("Why should we tell the truth?", "We should tell the truth because an honest word makes the heart light."),
                    ("What is the moon?", "The moon is the bright light in the night sky."), ("What is a river?", "A river is water that runs to the sea.")])
    return w


def small_talk(rng, name):
    kind = rng.randrange(9)
    if kind == 0:
        return e(rng, "[Hello!|Hi!|Hello.|Hi there!|Good morning!|Hey!|Good evening!]"), e(rng, "[Hello! How can I help you?|Hello! Would you like to hear a story?|Hi! It is nice to meet you.]")
    if kind == 1:
        return e(rng, "[How are you?|How are you today?|Are you well?]"), e(rng, "[I am well, thank you. How are you?|I am fine, thank you. Would you like a story?]")
    if kind == 2:
        return e(rng, "[Who are you?|What are you?|Tell me about yourself.]"), (f"My name is {name}. I am a small model that tells stories." if name else "I am a small model. I tell short stories and answer simple questions.")
    if kind == 3:
        return e(rng, "[What is your name?|Do you have a name?]"), (f"My name is {name}." if name else "I do not have a name. I am a small story model.")
    if kind == 4:
        return e(rng, "[What can you do?|How can you help me?|What do you know?]"), "I can tell short stories, answer simple questions and talk about animals, places and feelings."
    if kind == 5:
        return e(rng, "[Thank you!|Thanks!|Thank you very much.|Thanks a lot.]"), e(rng, "[You are welcome!|You are welcome! Is there anything else?]")
    if kind == 6:
        return e(rng, "[Goodbye!|Bye!|Good night!|See you later!]"), e(rng, "[Goodbye! Come back soon.|Goodbye! Have a nice day.]")
    if kind == 7:
        f, answer = rng.choice([("sad", "I am sorry to hear that. A friend and a good story can help."), ("happy", "I am glad to hear that! What made you happy?"),
                                ("tired", "You should rest. A quiet song and a warm bed can help."), ("afraid", "Take a deep breath. Fear grows small when a friend is near."),
                                ("lonely", "I am here to talk with you. A smile is the start of a friendship."), ("bored", "Would you like to hear a story about a fox?"),
                                ("angry", "Count to ten and breathe slowly. Then a kind word can help."), ("hungry", "You could eat some bread or an apple.")])
        return e(rng, "[I am {f}.|I feel {f} today.|I am very {f}.]", f=f), answer
    return rng.choice(UNKNOWN), e(rng, "[I do not know that. I am a small model that tells stories.|I am sorry, I do not know. I only know stories and simple things.]")


SUMMARIES = {
    "lost": "{N} the {k} lost {his} {o}, and {G} the {gk} helped {him} to find it.", "cross": "{N} the {k} could not get past a {bar}, and {G} the {gk} helped {him}.",
    "fear": "{N} the {k} was afraid of {what}, but with the help of {F} {he} was brave.", "share": "{N} and {F} wanted the same {obj}, but then they learned to share it.",
    "bake": "{N} the {k} wanted to make {food}, and {G} helped {him} to find {m0}.", "rescue": "{N} the {k} saved {G} the {gk}, who was stuck {stuck}.",
    "storm": "A storm came, and {N} the {k} gave {F} a safe place to stay.", "race": "{N} the {k} and {F} the {fk} ran a race.",
    "plant": "{N} the {k} planted a seed, and at last a {plant} grew.", "lonely": "{N} the {k} was lonely, and then {he} met {F} the {fk}.",
    "truth": "{N} the {k} broke a {obj} and at last told {F} the truth.", "gift": "{N} the {k} worked for {G} to get a {obj} for {F}.",
    "lost_way": "{N} the {k} was lost, and {G} the {gk} showed {him} the way home.", "sleep": "{N} the {k} could not sleep, and {F} the {fk} helped {him}.",
    "treasure": "{N} the {k} and {F} the {fk} looked for a treasure and found a {o}.", "learn": "{N} the {k} learned to {skill} with the help of {F} the {fk}.",
    "show": "{N} the {k} and {F} the {fk} put on a show.",
}

BY_SIZE = ["ant", "bee", "snail", "mouse", "robin", "hedgehog", "rabbit", "cat", "fox", "goat", "lion", "bear", "horse", "elephant"]
RHYMES = ["cat hat mat", "tree bee sea", "moon spoon noon", "night light bright", "day play way", "house mouse", "bear chair pear", "boat goat coat",
          "star car far", "rain train lane", "fox box rocks", "snow grow know", "king ring sing", "cake lake snake", "bell well shell"]
HOW_TO = {
    "plant a seed": "1. Dig a small hole.\n2. Put the seed in the hole.\n3. Cover it with earth.\n4. Give it water every day.",
    "make bread": "1. Mix flour, water and salt.\n2. Press the dough with your hands.\n3. Let it rest for an hour.\n4. Bake it until it is brown.",
    "make tea": "1. Boil some water.\n2. Put the tea in a pot.\n3. Pour the water on it.\n4. Wait a little and drink.",
    "build a snowman": "1. Roll a big ball of snow.\n2. Put a small ball on top.\n3. Use stones for the eyes.\n4. Use a carrot for the nose.",
    "fly a kite": "1. Wait for a windy day.\n2. Hold the string.\n3. Run into the wind.\n4. Let the kite go up.",
    "make a friend": "1. Smile and say hello.\n2. Tell your name.\n3. Listen well.\n4. Be kind and share.",
    "fall asleep": "1. Lie down in a warm bed.\n2. Close your eyes.\n3. Breathe slowly.\n4. Think of something nice.",
    "make soup": "1. Cut the carrots and onions.\n2. Put them in a pot of water.\n3. Add some salt.\n4. Cook it until it is soft.",
}
ADVICE = [("I lost my [key|hat|book|ball]. What should I do?", "Think of the last place where you had it. Then ask a friend to help you look."),
          ("I had a quarrel with my friend. What should I do?", "Tell your friend that you are sorry. A kind word can end a quarrel."),
          ("I cannot sleep. What should I do?", "Drink some warm milk, close your eyes and breathe slowly."),
          ("I am afraid of the dark. What should I do?", "Light a small lamp and take a deep breath. Fear grows small when a friend is near."),
          ("I broke something. What should I do?", "Tell the truth and say that you are sorry. Then help to mend it."),
          ("I have no friends. What should I do?", "Smile and say hello to someone. A smile is the start of a friendship."),
          ("It is raining. What should I do?", "Take an umbrella, or stay inside and read a book."),
          ("I am lost. What should I do?", "Stay calm and look around. Then ask someone for the way.")]
LIKES = [("[What is your favourite colour?|Which colour do you like?]", "I like blue, the colour of the sky and the sea."), ("[What is your favourite animal?|Which animal do you like?]", "I like foxes, because they are clever."),
         ("[What is your favourite food?|What do you like to eat?]", "I cannot eat, but honey cake sounds good."), ("Do you like stories?", "Yes, I like stories very much."),
         ("Do you like music?", "Yes, I like music, and soft songs most of all."), ("[Are you a person?|Are you human?]", "No, I am a small model that tells stories."), ("Can you sing?", "I cannot sing, but I can write a short poem."),
         ("Do you sleep?", "No, I do not sleep. I am a model."), ("How old are you?", "I am very young. I was made from short stories."), ("Where do you live?", "I live inside a computer.")]


def more_facts(rng):
    """Comparisons, rhymes, counting, lists, steps, advice and likes."""
    kind = rng.randrange(10)
    if kind == 0:
        small, big = sorted(rng.sample(range(len(BY_SIZE)), 2))
        small, big = BY_SIZE[small], BY_SIZE[big]
        x, y = rng.sample([small, big], 2)
        if rng.random() < 0.5:
            return e(rng, "Which is [bigger|larger], a {x} or a {y}?", x=x, y=y), e(rng, "A {b} is bigger than a {s}.", b=big, s=small)
        return e(rng, "Which is smaller, a {x} or a {y}?", x=x, y=y), e(rng, "A {s} is smaller than a {b}.", b=big, s=small)
    if kind == 1:
        x, y = rng.sample(rng.choice(RHYMES).split(), 2)
        return e(rng, "[What rhymes with {x}?|Tell me a word that rhymes with {x}.]", x=x), f"The word {y} rhymes with {x}."
    if kind == 2:
        n = rng.randrange(3, 13)
        return e(rng, "[Count to {n}.|Can you count to {n}?]", n=NUMBERS[n]), listing(NUMBERS[1 : n + 1]).capitalize() + "."
    if kind == 3:
        group = rng.choice(["animals", "fruits", "colours", "flowers", "vegetables", "birds", "tools"])
        n = rng.randrange(2, 6)
        return (e(rng, "[Make a list of {n} {g}.|List {n} {g}.|Write a list of {n} {g}.]", n=NUMBERS[n], g=group),
                "\n".join(f"{i}. {word.capitalize()}" for i, word in enumerate(rng.sample(GROUPS[group], n), 1)))
    if kind == 4:
        x = rng.choice(list(HOW_TO))
        return e(rng, "[How do I {x}?|How do you {x}?|How can I {x}?|Tell me how to {x}.]", x=x), HOW_TO[x]
    if kind == 5:
        question, answer = rng.choice(ADVICE)
        return e(rng, question), answer
    if kind == 6:
        question, answer = rng.choice(LIKES)
        return e(rng, question), answer
    if kind == 7:
        place = rng.choice(list(PLACES))
        x, y = SCENERY[place]
        return e(rng, "[Describe {p}.|What is it like {w}?|Tell me about {p}.]", p=PLACES[place][0], w=PLACES[place][1]), f"{x.capitalize()}, and {y}."
    if kind == 8:
        x = rng.choice(list(ANIMALS))
        home, food, sound, young = ANIMALS[x]
        more = f" It lives in {home} and eats {food}." + (f" A baby {x} is called {a(young)}." if young and young != "baby" else "")
        return e(rng, "[Tell me about the {x}.|What is a {x}?|What do you know about the {x}?]", x=x), e(rng, "A {x} is an animal.", x=x) + more
    x, c = rng.choice([c for c in COLOUR_FACTS if " and " not in c[1] and " or " not in c[1]])
    if rng.random() < 0.5:
        return f"Is {x} {c}?", f"Yes, {x} is {c}."
    wrong = rng.choice([k for k in COLOURS if k != c])
    return f"Is {x} {wrong}?", f"No, {x} is {c}."


def small_passage(rng, split):
    """Two to four facts about different characters, and a question about one of them."""
    taken, facts = set(), []
    foods = rng.sample(FOODS, 4)
    kinds, places, things = [], [], []
    while len(kinds) < 4:
        kind = rng.choice(HERO_ANIMALS + ["boy", "girl", "baker", "farmer", "sailor"])
        place, thing = rng.choice(list(PLACES)), rng.choice(list(OBJECTS))
        fresh = kind not in kinds and place not in places and thing not in things
        if fresh and held_out(kind, place, thing) == (split == "held-out"):
            kinds.append(kind)
            places.append(place)
            things.append(thing)
    form = rng.randrange(6)
    for i in range(rng.randrange(2, 5)):
        c = Character(rng, kinds[i], taken)
        slots = {**c.slots("", "N"), "obj": things[i], "o": rng.choice(OBJECTS[things[i]][0]) + " " + things[i],
                 "at": PLACES[places[i]][1], "pl": PLACES[places[i]][0], "food": foods[i]}
        one = lambda text: expand(rng, text, slots)
        facts.append([
            (one("{N} the {k} has a {o}."), [("Who has the {obj}?", "{N} the {k} has the {obj}."), ("What does {N} have?", "{N} has a {o}.")]),
            (one("{N} the {k} lost {his} {o} {at}."), [("Who lost a {obj}?", "{N} the {k} lost a {obj}."), ("What did {N} lose?", "{N} lost {his} {o}."), ("Where did {N} lose the {obj}?", "{N} lost the {obj} {at}.")]),
            (one("{N} the {k} likes {food}."), [("Who likes {food}?", "{N} the {k} likes {food}."), ("What does {N} like?", "{N} likes {food}.")]),
            (one("{N} the {k} lives {at}."), [("Who lives {at}?", "{N} the {k} lives {at}."), ("Where does {N} live?", "{N} lives {at}.")]),
            (one("{N} the {k} found a {o} {at}."), [("Who found the {obj}?", "{N} the {k} found the {obj}."), ("What did {N} find?", "{N} found a {o}."), ("Where did {N} find the {obj}?", "{N} found the {obj} {at}.")]),
            (one("{N} the {k} went to {pl} with a {o}."), [("Who went to {pl}?", "{N} the {k} went to {pl}."), ("Where did {N} go?", "{N} went to {pl}."), ("What did {N} take?", "{N} took a {o}.")]),
        ][form if rng.random() < 0.7 else rng.randrange(6)])
        facts[-1] = (facts[-1][0], [(one(q), one(a_)) for q, a_ in facts[-1][1]] + [(one("What is {N}?"), one("{N} is a {k}.")), (one("What is the name of the {k}?"), one("The name of the {k} is {N}."))])
    passage = " ".join(text for text, _ in facts)
    asked = rng.sample([pair for _, pairs in facts for pair in pairs], rng.randrange(1, 4))
    lead = e(rng, "[Read this and answer the question.\n\n|Read this story and answer the question.\n\n||Here is a text.\n\n]")
    return [(lead + passage + e(rng, "[\n\n| ]") + asked[0][0], asked[0][1])] + asked[1:]


def poem(rng):
    lines = {
        "moon": ["The moon is round, the moon is bright,", "It fills the sky with silver light.", "The stars come out, one, two and three,", "And shine upon the quiet sea."],
        "rain": ["The rain comes down on roof and tree,", "It sings a little song to me.", "The flowers drink, the rivers run,", "And then comes out the yellow sun."],
        "spring": ["The snow is gone, the grass is green,", "The finest day that I have seen.", "The birds all sing, the flowers grow,", "And soft and warm the breezes blow."],
        "sea": ["The sea is wide, the sea is deep,", "It sings the little boats to sleep.", "The waves roll in, the waves roll out,", "And white birds fly and cry about."],
        "friend": ["A friend is warm, a friend is true,", "A friend will share a loaf with you.", "When days are dark and nights are long,", "A friend will sing a happy song."],
        "winter": ["The snow falls down without a sound,", "And lies like feathers on the ground.", "We light the fire, we close the door,", "And tell our stories by the score."],
    }
    topic = rng.choice(list(lines))
    article = "the " if topic in ("moon", "rain", "sea") else ("a " if topic == "friend" else "")
    return e(rng, "[Write a poem about {x}.|Write a short poem about {x}.|Tell me a poem about {x}.]", x=article + topic), "\n".join(lines[topic])


def story_request(rng, split, episodes=1):
    """A request that names some of hero, place, object, name; and the tale."""
    t = story(rng, split, episodes)
    s = t.slots
    options = [
        ("[Tell me a story.|Tell me a short story.|Please tell me a story.|Can you tell me a story?|I would like to hear a story.]", 1),
        ("[Tell me a story about|Write a story about|Please tell me a story about|I want a story about|Write a short story about] a {k}.", 3),
        ("[Can you tell me|Could you tell me|Will you tell me] a story about a {k}?", 1),
        ("[Tell me a story about|Write a story about] a {t} {k}.", 0.5 if t.hero.trait in t.text() else 0),
        ("[Tell me a story about|Write a short story about|Write a story about] a {k} named {N}.", 3),
        ("[Tell me a story about|Write a story about] {N} the {k}.", 1),
    ]
    body = t.text()
    if episodes == 1:
        if s["obj"] in body:
            options += [("[Tell me a story about|Write a story about|Tell me a short story about|I want to hear about] a {k} and a {obj}.", 5),
                        ("[Tell me a story about|Write a story about] a {k} with a {o}.", 1)]
        if s["pl"] in body or s["at"] in body:
            options += [("[Tell me a story about|Write a story about|Tell me a short story about] a {k} {at}.", 3),
                        ("[Tell me a story about|Write a story about] a {k} and {pl}.", 2)]
        if s["F"] in body:
            options += [("[Tell me a story about|Write a story about] a {k} and a {fk}.", 3)]
        themed = {
            "lost": "a {k} who lost {his} {obj}", "fear": "a {k} who was afraid of {what}", "race": "a {k} and a race", "storm": "a {k} and a storm",
            "plant": "a {k} who grew a {plant}", "bake": "a {k} who made {food}", "lonely": "a lonely {k}", "truth": "a {k} who told the truth",
            "sleep": "a {k} who could not sleep", "lost_way": "a {k} who lost {his} way", "gift": "a {k} and a gift", "rescue": "a {k} who helped a {gk}",
            "share": "a {k} who learned to share", "cross": "a {k} and a {bar}", "treasure": "a {k} and a treasure",
            "learn": "a {k} who learned to {skill}", "show": "a {k} and a show",
        }
        options += [("[Tell me a story about|Write a story about|Tell me a short story about] " + themed[t.theme] + ".", 4)]
    elif s["F"] in body:
        options += [("[Tell me a long story about|Write a long story about] a {k} and a {fk}.", 3)]
    if episodes > 1:
        options += [("[Tell me a long story about|Write a long story about|Please tell me a long story about] a {k}.", 6)]
    template = rng.choices([o for o, _ in options], [w for _, w in options])[0]
    return t.text_of(template), t


def chat(rng, split, long=False, practice=False):
    turns = []
    name = None
    roll = rng.random()
    if roll < 0.1:
        name = rng.choice(HE_NAMES + SHE_NAMES) if rng.random() < 0.7 else invented_name(rng)
        turns.append(("system", e(rng, "[Your name is {n}.|You are {n}, a friendly storyteller.|You are {n}. You tell stories.]", n=name)))
    elif roll < 0.3:
        turns.append(("system", rng.choice(SYSTEMS)))

    def add(question, answer):
        turns.append(("user", question))
        turns.append(("assistant", answer))

    def sum_up(t):
        add(e(rng, "[Summarise the story.|Tell me the story in one sentence.|What happened in the story?|What is the story about?]"), t.text_of(SUMMARIES[t.theme]))

    def ask_about(t, count):
        for question, answer in rng.sample(t.questions, min(count, len(t.questions))):
            add(question, answer)

    if long:
        tales = []
        for _ in range(rng.randrange(3, 6)):
            request, t = story_request(rng, split, rng.choice([1, 1, 1, 2, 4]))
            add(request, t.text())
            ask_about(t, rng.randrange(0, 3))
            if rng.random() < 0.4:
                add(*plain_fact(rng))
            tales.append(t)
        kinds = [t.hero.kind for t in tales]
        for t in rng.sample(tales, 2):
            # Far recall: only asked when the kind points at one tale.
            if kinds.count(t.hero.kind) == 1:
                add(t.text_of("What was the name of the {k}?"), t.text_of("The name of the {k} was {N}."))
        return turns
    form = rng.random()
    if practice:
        # Short exchanges, where nearly every token of the answer teaches something.
        form = rng.choices([0.2, 0.5, 0.6, 0.8, 0.97], [18, 8, 35, 35, 4])[0]
    if form < 0.38:
        if rng.random() < 0.15:
            add(*small_talk(rng, name))
        request, t = story_request(rng, split)
        add(request, t.text())
        ask_about(t, rng.choice([0, 0, 1, 2, 3]))
        if rng.random() < 0.15:
            sum_up(t)
        if rng.random() < 0.08:
            add(e(rng, "[Give the story a title.|What is a good title for this story?]"),
                "The " + t.hero.kind.capitalize() + " and the " + rng.choice([t.friend.kind if t.friend.name in t.text() else t.thing if t.thing in t.text() else t.place, "Friend"]).capitalize())
        if rng.random() < 0.12:
            add(e(rng, "[Tell me another story.|Another one, please.|Tell me one more story.]"), story(rng, split).text())
    elif form < 0.56:
        t = story(rng, split)
        # A short passage: the first paragraph, so its questions can be asked.
        body = t.text()
        question, answer = rng.choice(t.questions)
        if rng.random() < 0.6:
            add(e(rng, "[Read this story and answer the question.|Here is a story.|Read the story.]") + "\n\n" + body + "\n\n" + question, answer)
            if rng.random() < 0.2:
                sum_up(t)
            ask_about(t, rng.choice([0, 1, 1]))
        else:
            cut = body.index(". ") + 1
            add(e(rng, "[Continue this story:|Finish this story:|Go on with this story:]") + " " + body[:cut], body[cut + 1 :])
    elif form < 0.72:
        for question, answer in small_passage(rng, split):
            add(question, answer)
    elif form < 0.94:
        user = None
        count = rng.randrange(1, 9)
        tell = rng.randrange(count) if rng.random() < 0.3 else -1
        for index in range(count):
            if index == tell:
                user = rng.choice(HE_NAMES + SHE_NAMES) if rng.random() < 0.6 else invented_name(rng)
                add(e(rng, "[My name is {u}.|Hello, my name is {u}.|I am called {u}.|Hi, I am {u}.]", u=user), e(rng, "[Hello, {u}! It is nice to meet you.|Nice to meet you, {u}!|Hello, {u}! How can I help you?]", u=user))
            elif user and rng.random() < 0.3:
                add(e(rng, "[What is my name?|Do you know my name?|Who am I?]"), f"Your name is {user}.")
            elif not user and rng.random() < 0.02:
                add("What is my name?", "I do not know your name. What is it?")
            else:
                pick = rng.random()
                add(*(small_talk(rng, name) if pick < 0.27 else more_facts(rng) if pick < 0.52 else plain_fact(rng)))
    else:
        add(*poem(rng))
        if rng.random() < 0.5:
            add(*small_talk(rng, name))
    return turns


# --- the stream of documents -----------------------------------------------


def documents(seed, split, long_share=0.08, chat_share=0.45, practice=False):
    """Endless documents of one split: a string is plain text, a list is a chat.

    `long_share` is the share of long stories and long chats, `chat_share` that
    of chats among the rest; `practice` makes most chats short questions.
    """
    rng = random.Random(f"{seed}/{split}")
    while True:
        if rng.random() < long_share:
            if rng.random() < 0.55:
                yield story(rng, split, rng.randrange(4, 13)).text()
            else:
                yield chat(rng, split, long=True)
        elif rng.random() < chat_share:
            yield chat(rng, split, practice=practice)
        else:
            t = story(rng, split, rng.choices([1, 2, 3], [8, 2, 1])[0])
            if rng.random() < 0.08:
                # Some texts start in the middle, as prompts may.
                sentences = [s for p in t.paragraphs for s in p[:-1] + [p[-1] + "\n\n"]]
                start = rng.randrange(1, max(2, len(sentences) // 2))
                text = " ".join(sentences[start:]).replace("\n\n ", "\n\n").strip()
                yield text
            else:
                yield t.text()


if __name__ == "__main__":
    import sys

    source = documents(int(sys.argv[1]) if len(sys.argv) > 1 else 7, "train")
    for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 10):
        document = next(source)
        print(document if isinstance(document, str) else "\n".join(f"<{r}> {x}" for r, x in document))
        print("-" * 60)
