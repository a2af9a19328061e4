"""Beginnings of the texts that a model writes itself: what its user may ask for, and plain text.

Static ranges hold for the kinds of text that they were set on, and learning fits the kinds that it
saw: SmolLM2-135M in w8a8 is 2.7% above float's perplexity on code after learning on an encyclopedia
alone, and 0.7% with code and text of its own beside it (benchmarks/README.md).
"""

from __future__ import annotations

from itertools import chain, zip_longest

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
)
"""First messages of chats: facts, code, sums, languages, tables and tales."""

_OPENERS = {
    "code": (
        'import os\nimport sys\n\n\ndef main():\n    """',
        "import numpy as np\n\n\ndef ",
        "class Stack:\n    def __init__(self",
        "from dataclasses import dataclass\n\n\n@dataclass\nclass ",
        "#include <stdio.h>\n#include <stdlib.h>\n\n",
        "function fetchData(url, callback) {\n",
        "package main\n\nimport (\n",
        "public class ",
        "import unittest\n\n\nclass Test",
        "try:\n    with open(path) as f:\n",
        '"""Tools for parsing dates and times.\n\n',
        "def _read_header(stream, size=None):\n",
        "SELECT name, COUNT(*) FROM ",
        "#!/bin/bash\nset -e\n\n",
        "<!DOCTYPE html>\n<html>\n<head>\n",
        "async def handle(request):\n",
    ),
    "sums": (
        "Problem: A shop sells pens at 3 dollars each and notebooks at ",
        "Tom has 12 marbles. He gives ",
        "If 5 workers can build a wall in 8 days, how many days ",
        "Find the value of x if 3x + 7 = 22.\nSolution:",
        "A rectangle is 14 cm long and ",
        "The average of five numbers is 18. ",
        "The ratio of boys to girls in a class is 3 : 4. ",
        "A tank is filled by two pipes in 12 and 15 hours. ",
        "Compute 48 * 25.\n48 * 25 = ",
        "What is the probability that two dice show a sum of ",
        "The price of a book rose by 20% and then fell by ",
        "Let f(x) = x^2 - 4x + 3. ",
    ),
    "prose": (
        "Many people believe that ",
        "In recent years, scholars have debated whether ",
        "The author argues that ",
        "It is often said that history ",
        "The law requires that ",
        "Although the theory explains most of the evidence, ",
        "Once upon a time, in a small village, ",
        "She closed the door behind her and ",
        '"I don\'t understand," he said. "',
        "Researchers at the university have found that ",
        "The city council voted on Tuesday to ",
        "Dear Sir or Madam,\n\n",
        "The poem was written at a time when ",
        "Critics of the policy point out that ",
    ),
    "encyclopedia": (
        "The river rises in ",
        "He was born in 18",
        "The species is found in ",
        "The film was released in ",
        "The battle took place on ",
        "The album received ",
        "In mathematics, a ",
        "The town lies in ",
        "The disease is caused by ",
        "The company was founded in ",
    ),
    "data": (
        '{"name": "',
        '[{"id": 1, "',
        "| Year | Population |\n|---|---|\n| 1990 | ",
        "date,open,high,low,close\n",
        "# Installation\n\n```\npip install ",
        "1. First, ",
        "name: build\non:\n  push:\n",
        "- [ ] ",
    ),
    "languages": (
        "Der Roman erzählt von ",
        "La ville est située ",
        "El presidente anunció ",
        "Il libro racconta ",
        "O Brasil é ",
        "Москва является ",
        "日本の首都は",
        "中国的经济",
    ),
}
"""Beginnings of plain text, by domain."""


def plain() -> tuple[tuple[str, str], ...]:
    """Beginnings of plain text, each with its domain: the domains in turn, each beginning once.

    >>> plain()[1]
    ('sums', 'Problem: A shop sells pens at 3 dollars each and notebooks at ')
    """
    named = [[(domain, text) for text in texts] for domain, texts in _OPENERS.items()]
    return tuple(pair for pair in chain.from_iterable(zip_longest(*named)) if pair is not None)
