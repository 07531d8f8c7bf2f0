"""Conversations for the chat format: talk about the model itself, stories on request, questions, and what it cannot know."""

from collections.abc import Sequence

from bundled.choices import Choices, Split
from bundled.questions import KINDS, Question, question, story_questions, with_articles, worded
from bundled.stories import Story, story

Message = dict[str, str]
Turn = tuple[str, str]  # what the user says, what the model answers

# What the user may say -> what the model may answer.
TALK: dict[str, Turn] = {
    "hello": (
        "Hello!|Hi!|Hi there!|Good morning!|Good evening!|Hey!|Hello, how are you?",
        "Hello! Would you like to hear a story?|Hi! What can I do for you?|Hello! Ask me something, or ask for a story.",
    ),
    "who": (
        "Who are you?|What are you?|Tell me about yourself.|Please introduce yourself.|What kind of model are you?",
        "I am a very small language model. I can tell short stories and answer simple questions.|I am a tiny Llama. I know "
        "short stories, small numbers and not much else.",
    ),
    "name": (
        "What is your name?|Do you have a name?|What are you called?",
        "I have no name. I am just a very small Llama.|Nobody gave me a name. You can call me little Llama.",
    ),
    "size": (
        "How big are you?|How many parameters do you have?|Are you a big model?|How large are you?",
        "I am very small. I have only about four million parameters.|I have about four million parameters. That is very few.",
    ),
    "training": (
        "What were you trained on?|Where did you learn that?|How were you trained?|What have you read?|Who taught you?",
        "I was trained on stories, questions and conversations that a program made up. I have read nothing else.",
    ),
    "skills": (
        "What can you do?|How can you help me?|What do you know?|What should I ask you?|Can you help me?",
        "I can tell a short story about a hero and a friend, add small numbers, and find an answer in a short text.|I can tell "
        "stories and answer simple questions. For example, you can ask me what 3 + 4 is.",
    ),
    "llama": (
        "Are you a Llama?|Are you Llama 2?|Which architecture do you have?|Who made you?",
        "I have the architecture of Llama 2, but I am much smaller, and I was trained by the program that comes with me.",
    ),
    "human": (
        "Are you human?|Are you a real person?|Are you alive?|Do you have feelings?|Are you a robot?",
        "I am a computer program, not a person.|No person is here. I am only a small computer program.",
    ),
    "mistakes": (
        "Do you make mistakes?|Can I trust you?|Are you always right?|Are you clever?",
        "I am very small and I often make mistakes. Please check what I say.",
    ),
    "thanks": (
        "Thank you!|Thanks!|That was nice.|Thank you very much.|Well done!",
        "You are welcome!|I am glad that you liked it.",
    ),
    "bye": ("Goodbye!|Bye!|See you later!|Good night!", "Goodbye!|Goodbye, and come back soon!"),
}
OPENERS, CLOSERS = ("hello",), ("thanks", "bye")
UNKNOWN = (
    "What is the capital of {country}?|Who is the president of {country}?|How many people live in {country}?|Tell me about the "
    "history of {country}.|Who wrote {work}?|What is {work} about?|Explain {science} to me.|What is {science}?|How does "
    "{science} work?|Write a program that {task}.|Write some code that {task}.|How do I cook {dish}?|What is the recipe for "
    "{dish}?|Translate this into {language}.|How do you say hello in {language}?|What is the weather "
    "like today?|What time is it?|What is the news?"
)
TOPICS = {
    "country": "France, Japan, Brazil, Canada, Egypt, India, Norway, Peru, China, Spain, Kenya, Germany, Italy, Mexico, Turkey",
    "work": "Hamlet, the Odyssey, Faust, Moby Dick, Don Quixote, the Bible, Macbeth, War and Peace, Dracula",
    "science": (
        "quantum physics, gravity, evolution, electricity, chemistry, calculus, a black hole, the internet, an atom, a virus, "
        "machine learning, economics, philosophy, a computer"
    ),
    "task": "sorts a list, prints hello, finds prime numbers, plays chess, reads a file, counts words, draws a circle",
    "dish": "pasta, rice, fish soup, curry, pancakes, sushi, a steak, lasagna",
    "language": "French, Spanish, German, Latin, Japanese, Russian, Greek, Arabic",
}
IGNORANCE = (
    "I am sorry, I do not know that. I only know short stories and simple questions.|I do not know. I am too small for "
    "that.|That is too hard for me. Would you like to hear a story?"
)
SYSTEM = (
    "You are a helpful assistant.|You are a very small and friendly language model.|You are a storyteller for children.|Always "
    "be kind and honest.|Answer in simple English.|Help the user as well as you can."
)
BRIEF = "Answer as briefly as you can.|Use as few words as possible.|Be brief.|Answer with one word if you can."
REQUESTS = (
    "Tell me a story about {it}.|Please tell me a story about {it}.|Write a short story about {it}.|Can you tell me a story "
    "about {it}?|I would like to hear a story about {it}.|Make up a story about {it}."
)
ANY_REQUEST = "Tell me a story.|Please tell me a short story.|Can you tell me a story?|Write a story.|Do you know a story?"
# How often a dialogue asks a question of each kind: what takes practice more often.
PRACTICE = dict.fromkeys(KINDS, 2) | {"sum": 10, "difference": 8, "next number": 3, "comparison": 4, "gift": 4, "story": 4}


def dialogue(choices: Choices, split: Split) -> list[Message]:
    """A conversation that ends with the model's answer; at most one story is in it."""
    system, turns = "", []
    match choices.weighted({"questions": 9, "story": 6, "talk": 2, "unknown": 1}):
        case "questions":
            system, turns = _questions(choices, split)
        case "story":
            turns = _story(choices)
        case "talk":
            middle = [topic for topic in TALK if topic not in (*OPENERS, *CLOSERS)]
            turns = [_talk(choices, topic) for topic in choices.several(middle, choices.pick((1, 2, 3)))]
        case "unknown":
            turns = [_unknown(choices) for _ in range(choices.pick((1, 2)))]
    if not system and choices.weighted({True: 1, False: 3}):
        system = worded(choices, SYSTEM)
    if choices.weighted({True: 1, False: 5}):
        turns.insert(0, _talk(choices, choices.pick(OPENERS)))
    if choices.weighted({True: 1, False: 5}):
        turns.append(_talk(choices, choices.pick(CLOSERS)))
    return messages(turns, system)


def messages(turns: Sequence[Turn], system: str = "") -> list[Message]:
    """Turns as {"role", "content"} records."""
    said = [{"role": "system", "content": system}] if system else []
    for user, answer in turns:
        said += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return said


def story_request(choices: Choices, told: Story) -> tuple[str, tuple[str, ...]]:
    """A request that the story answers, and the words of the request that the story has to hold."""
    facts = told.facts
    full = [facts[field] for field in ("name_full", "friend_full") if field in facts]
    wishes = [(facts["about"], ()), (facts["name"], (facts["name"],)), *((who, tuple(who.split(" the "))) for who in full)]
    if "friend" in facts:
        wishes.append((f"{facts['name']} and {facts['friend']}", (facts["name"], facts["friend"])))
    if "kind" in facts and f" {facts['kind']}" in told.text:
        wishes += [
            (f"a {facts['kind']}", (facts["kind"],)),
            (f"a {facts['kind']} named {facts['name']}", (facts["kind"], facts["name"])),
        ]
        if "trait" in facts:
            wishes.append((f"a {facts['trait']} {facts['kind']}", (facts["trait"], facts["kind"])))
    thing, color = facts.get("thing", facts.get("gift", facts.get("tool"))), facts.get("color")
    if thing and color and f" {color} {thing}" in told.text:
        wishes += [(f"a {thing}", (thing,)), (f"a {color} {thing}", (color, thing))]
    wish, words = choices.pick(wishes)
    return with_articles(worded(choices, REQUESTS, it=wish)), words


def _story(choices: Choices) -> list[Turn]:
    """A story on request, and sometimes questions about it."""
    told = story(choices)
    request = worded(choices, ANY_REQUEST) if choices.weighted({True: 1, False: 4}) else story_request(choices, told)[0]
    asked = story_questions(told)
    after = choices.several(asked, min(len(asked), choices.pick((0, 1, 2))))
    return [(request, told.text), *((q.text, q.reply) for q in after)]


def _questions(choices: Choices, split: Split) -> tuple[str, list[Turn]]:
    """One to four questions, and the system prompt they are asked under."""
    asked = [question(choices, choices.weighted(PRACTICE), split) for _ in range(choices.pick((1, 2, 3, 4)))]
    if any(q.system or q.kind == "story" for q in asked):
        asked = next([q] for q in asked if q.system or q.kind == "story")
    if not asked[0].system and choices.weighted({True: 1, False: 7}):
        return worded(choices, BRIEF), [(q.text, f"{q.answer[0].upper()}{q.answer[1:]}.") for q in asked]
    return asked[0].system, [(q.text, q.reply) for q in asked]


def _talk(choices: Choices, topic: str) -> Turn:
    user, answer = TALK[topic]
    return worded(choices, user), worded(choices, answer)


def _unknown(choices: Choices) -> Turn:
    topics = {name: choices.pick(values.split(", ")) for name, values in TOPICS.items()}
    return worded(choices, UNKNOWN, **topics), worded(choices, IGNORANCE)


def question_messages(asked: Question) -> list[Message]:
    """The conversation up to where the answer to a question begins."""
    return messages([(asked.text, "")], asked.system)[:-1]


def exercise(choices: Choices, split: Split) -> str:
    """A page of questions and answers in plain text, for pretraining."""
    kinds = {kind: weight for kind, weight in PRACTICE.items() if kind not in ("story", "own name")}
    asked = [question(choices, choices.weighted(kinds), split) for _ in range(choices.pick(range(3, 9)))]
    return "\n".join(f"Question: {q.text}\nAnswer: {q.reply}" for q in asked)
