"""Beginnings of the plain text that a model writes itself, by domain (of chats: `dialogues`).

Static ranges hold for the kinds of text that they were set on, and learning fits the kinds that it
saw: SmolLM2-135M in w8a8 is 2.7% above float's perplexity on code after learning on an encyclopedia
alone, and 0.7% with code and text of its own beside it (benchmarks/README.md).
"""

from __future__ import annotations

from itertools import chain, zip_longest

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
        '<?xml version="1.0"?>\n<',
        "date,open,high,low,close\n",
        "# Installation\n\n```\npip install ",
        "1. First, ",
        "name: build\non:\n  push:\n",
        "- [ ] ",
        "[2024-03-01 12:00:07] INFO ",
        "[tool.poetry]\nname = ",
    ),
    "tables": (
        "| Year | Population |\n|---|---|\n| 1990 | ",
        "Country,Capital,Area\nNorway,Oslo,",
        "| Name | Age | City |\n|:-----|----:|------|\n| ",
        "id\tname\tprice\n1\t",
        "<table>\n  <tr><th>Month</th><th>Sales</th></tr>\n  <tr><td>",
        "| Feature | Basic | Pro |\n| --- | --- | --- |\n| ",
        "Team         Played  Won  Lost\n",
        "\\begin{tabular}{lrr}\nMethod & Accuracy & Time \\\\\n",
        "| Command | Description |\n|---|---|\n| `",
        "Element  Symbol  Number\nHydrogen H       1\n",
    ),
    "tools": (
        '{"tool_calls": [{"name": "get_weather", "arguments": {"city": "',
        '{"name": "search", "arguments": {"query": "',
        '<tool_call>\n{"name": "',
        '{"type": "function", "function": {"name": "',
        '{"role": "tool", "content": "{\\"temperature\\": ',
        '{"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "',
        '{"action": "create_event", "parameters": {"title": "',
        '{"$schema": "https://json-schema.org/draft/2020-12/schema", "properties": {',
    ),
    "languages": (
        "Der Roman erzählt von ",
        "La ville est située",
        "El presidente anunció ",
        "Il libro racconta ",
        "O Brasil é ",
        "Москва является ",
        "日本の首都は",
        "中国的经济",
        "De stad ligt aan ",
        "한국의 수도는",
        "تقع المدينة في ",
        "भारत की राजधानी ",
        "Miasto leży nad ",
        "Şehir ülkenin ",
        "Thành phố nằm ",
        "Kota ini terletak ",
        "Книга розповідає про ",
        "Staden ligger vid ",
        "Η πόλη βρίσκεται ",
        "เมืองหลวงของ",
        "העיר נמצאת ",
        "Město leží na ",
        "این شهر در ",
        "শহরটি অবস্থিত ",
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
