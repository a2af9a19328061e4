"""Beginnings of chats that a model answers: questions, system prompts, several turns, tools.

All of them were written for this list. Earlier answers of a dialogue are part of its beginning, so
that the model draws the last one only.
"""

from __future__ import annotations

import json
from itertools import chain, zip_longest

Messages = tuple[tuple[str, str], ...]
"""A chat up to the answer that is asked for: (role, content) of each message."""

QUESTIONS = (
    "What is the capital of France?",
    "Explain photosynthesis to a ten-year-old.",
    "Write a Python function that reverses a string.",
    "Give me three tips for sleeping better.",
    "Translate 'Good morning, how are you?' into Spanish.",
    "Write a short poem about the sea.",
    "A train travels 120 km in 90 minutes. What is its average speed?",
    "Summarize the causes of the First World War.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite email asking for a day off.",
    "How do I cook rice?",
    "List five animals that live in the desert.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "Correct the grammar: 'She don't like apples.'",
    "Tell me a story about a robot that learns to paint.",
    "What should I see in Japan in one week?",
    "Write a SQL query that counts the orders of each customer.",
    "Is 221 a prime number? Explain step by step.",
    "Give the planets and their moons as a JSON object.",
    "Compare cats and dogs as pets in a table.",
    "Write a C program that sorts an array of integers.",
    "A shirt costs 40 dollars and is 15% off. What do I pay?",
    "Argue for and against school uniforms.",
    "Explain the difference between a list and a tuple in Python.",
    "Write a unit test for a function that adds two numbers.",
    "How many seconds are there in a week? Show your work.",
    "Erkläre in zwei Sätzen, was ein Vulkan ist.",
    "Escribe una carta corta a un amigo.",
    "Rewrite this more formally: 'Hey, send me the file asap.'",
    "What happens in the body when we exercise?",
    "Find the bug: for i in range(len(a)): a[i] = a[i + 1]",
    "Plan a vegetarian dinner for four people.",
    "Explique en trois phrases pourquoi le ciel est bleu.",
    "用三句话介绍一下长城。",
    "日本の四季について短く教えてください。",
    "Расскажи коротко, как работает холодильник.",
    "Dê três dicas para aprender uma língua.",
    "اكتب فقرة قصيرة عن فوائد القراءة.",
    "भारत के तीन बड़े शहरों के नाम बताइए।",
    "Scrivi una ricetta semplice per la pasta.",
)
"""First messages of chats: facts, code, sums, languages, tables and tales."""

SYSTEMS = (
    ("You are a patient maths tutor. Show every step.", "Solve 2x + 5 = 17."),
    ("You are a senior software engineer. Answer with code only.", "Read a CSV file in Python."),
    ("Answer in one sentence.", "Why do leaves change colour in autumn?"),
    ("You are a pirate. Stay in character.", "How is the weather today?"),
    ("You are a customer service agent of a bookshop.", "My parcel has not arrived yet."),
    ("Answer as a JSON object with the keys title, year and genre.", "A film about space travel."),
    ("Du bist ein freundlicher Reiseführer. Antworte auf Deutsch.", "What can I see in Berlin?"),
    ("You are a doctor who explains things simply.", "What does high blood pressure mean?"),
    (
        "Reply with a Markdown table and nothing else.",
        "Three programming languages and their uses.",
    ),
    ("You translate everything into French.", "The train leaves at nine from platform four."),
    ("You are a strict editor. List the mistakes.", "Their going to the libary tomorow."),
    ("You are a game master. Describe the scene in two paragraphs.", "I open the iron door."),
    ("You are a legal assistant. Be precise and cautious.", "What is a non-disclosure agreement?"),
    ("You only know what is in the text.\nText: The shop opens at ten.", "When does it open?"),
    ("Eres un profesor de historia. Responde en español.", "¿Quién fue Simón Bolívar?"),
    ("You classify reviews as positive or negative.", "The battery died after two days."),
)
"""A system prompt, and the first question."""

DIALOGUES = (
    (
        "Recommend a book about the sea.",
        "Moby-Dick by Herman Melville is a classic: a captain hunts a white whale.",
        "Is there something shorter?",
    ),
    (
        "Write a Python function that adds two numbers.",
        "def add(a, b):\n    return a + b",
        "Now make it take any number of arguments.",
    ),
    (
        "What is 17 times 6?",
        "17 times 6 is 102.",
        "And half of that, plus nine?",
    ),
    (
        "Hi!",
        "Hello! How can I help you today?",
        "I want to learn the guitar. Where do I begin?",
    ),
    (
        "Name a large river in Africa.",
        "The Nile.",
        "How long is it?",
        "About 6,650 kilometres.",
        "Through which countries does it flow?",
    ),
    (
        "My code says: IndexError: list index out of range.",
        "Some index is as large as the list. Can you show me the line?",
        "while i <= len(items): print(items[i])",
    ),
    (
        "Suggest a name for a bakery.",
        "How about 'The Golden Crust'?",
        "Nice. Write a slogan for it, and three opening offers.",
    ),
    (
        "Wie sagt man 'thank you' auf Italienisch?",
        "Man sagt 'grazie'.",
        "Und auf Japanisch?",
    ),
    (
        "Who painted the Mona Lisa?",
        "Leonardo da Vinci painted it, from about 1503.",
        "Are you sure? My friend says it was Raphael.",
    ),
    (
        "Plan a day in Rome.",
        "Morning: the Colosseum. Noon: lunch in Trastevere. Evening: the Trevi Fountain.",
        "We have small children. Change the plan.",
    ),
    (
        "Summarize: The committee met for three hours and agreed on a smaller budget.",
        "The committee agreed on a smaller budget.",
        "Put it into the style of a newspaper headline.",
    ),
    (
        "Give me a table of three metals and their melting points.",
        "| Metal | Melting point |\n|---|---|\n| Iron | 1538 °C |\n| Gold | 1064 °C |\n"
        "| Lead | 327 °C |",
        "Add two more rows.",
    ),
)
"""Messages of user and assistant in turn; the last is the user's."""

_FUNCTIONS = {
    "get_weather": {"city": "string", "unit": "string"},
    "search_flights": {"origin": "string", "destination": "string", "date": "string"},
    "send_email": {"to": "string", "subject": "string", "body": "string"},
    "convert_currency": {"amount": "number", "source": "string", "target": "string"},
    "create_event": {"title": "string", "start": "string", "minutes": "integer"},
    "query_database": {"sql": "string", "limit": "integer"},
    "set_timer": {"minutes": "integer", "label": "string"},
    "play_music": {"artist": "string", "volume": "integer"},
}
_CALLS = (
    ("What is the weather in Oslo, in Celsius?", "get_weather", "set_timer"),
    ("Find a flight from Madrid to Vienna on the third of May.", "search_flights", "get_weather"),
    ("Tell anna@example.org that the meeting is moved to Friday.", "send_email", "create_event"),
    ("How much is 250 dollars in euros?", "convert_currency", "query_database"),
    ("Put a dentist's appointment on Tuesday at 9, half an hour.", "create_event", "set_timer"),
    ("Which ten customers bought most last year?", "query_database", "send_email"),
    ("Remind me of the pasta in eleven minutes.", "set_timer", "play_music"),
    ("Play something quiet by Satie.", "play_music", "get_weather"),
    ("Is it warmer in Lima or in Quito now?", "get_weather", "convert_currency"),
    ("Thank you, that was all.", "send_email", "play_music"),
)
"""A request, the function that it needs, and another one."""
_ORDER = (
    "You can call the functions below. To call one, answer with a JSON object with its name and"
    " its arguments, and with nothing else."
)


def _tools(*names: str) -> str:
    """A system prompt that offers functions."""
    offered = [{"name": name, "parameters": _FUNCTIONS[name]} for name in names]
    return "\n".join((_ORDER, *(json.dumps(function) for function in offered)))


def chats() -> tuple[tuple[str, Messages], ...]:
    """Chats, each with its domain: the kinds in turn, each chat once.

    >>> [domain for domain, _ in chats()[:5]]
    ['chat', 'system', 'turns', 'tools', 'chat']
    >>> chats()[0][1]
    (('user', 'What is the capital of France?'),)
    """
    roles = ("user", "assistant")
    kinds: dict[str, list[Messages]] = {
        "chat": [(("user", question),) for question in QUESTIONS],
        "system": [(("system", system), ("user", question)) for system, question in SYSTEMS],
        "turns": [
            tuple((roles[i % 2], content) for i, content in enumerate(turns)) for turns in DIALOGUES
        ],
        "tools": [(("system", _tools(*names)), ("user", question)) for question, *names in _CALLS],
    }
    named = [[(domain, messages) for messages in some] for domain, some in kinds.items()]
    return tuple(pair for pair in chain.from_iterable(zip_longest(*named)) if pair is not None)
