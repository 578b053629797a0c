"""First words of user turns: what a model's own prompts begin with, some of them.

Behind an empty header a model writes what it was trained on most, which may be code alone, and may
be half a document. A few words show that a person asks, and in which language. What is asked about
is the model's.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

SHARE = 0.75  # of the prompts begin with one of these; the others with the header alone
_STREAM = 1  # of random numbers, apart from those that draw tokens

# A kind, its share of the openings, and the openings.
KINDS: dict[str, tuple[float, tuple[str, ...]]] = {
    "question": (0.3, (
        "What is", "What are", "What does", "What's the difference between", "What happens when",
        "How do I", "How does", "How can I", "How many", "Why do", "Why is", "Why does", "Who was",
        "When did", "Where can I", "Which", "Should I", "Is it", "Are there", "Does", "Do you know",
        "Can you explain", "Could you tell me", "Would you",
    )),
    "request": (0.25, (
        "Explain", "Give me", "List", "Summarize", "Compare", "Describe", "Help me", "I need",
        "I want to", "I'm trying to", "I have", "My", "Please", "Suggest", "Tell me", "Make a",
        "Translate", "Recommend", "Rewrite", "Plan", "Solve", "Calculate", "Find", "Imagine",
    )),
    "writing": (0.2, (
        "Write a short story about", "Write a poem", "Write an email", "Write a letter",
        "Write an essay", "Write a blog post", "Write a speech", "Write a dialogue between",
        "Write a review of", "Write a product description", "Write a paragraph", "Draft a",
        "Compose", "Come up with", "Create a", "Tell me a story about",
    )),
    "code": (0.15, (
        "Write a Python function", "Write a SQL query", "Write a JavaScript function",
        "Write a program", "Write a bash script", "Write a class", "Write a regular expression",
        "Write unit tests for", "Implement", "How do I fix", "I get this error", "Debug",
        "What does this code do", "How can I sort", "Convert this", "In Python, how",
    )),
    "another language": (0.1, (
        "¿Qué es", "¿Cómo puedo", "Escribe", "Explícame", "Comment", "Qu'est-ce que", "Écris",
        "Pourquoi", "Was ist", "Wie kann ich", "Schreibe", "Erkläre", "O que é", "Como",
        "Escreva", "Che cos'è", "Come posso", "Что такое", "Как", "Напиши", "请", "什么是",
        "如何", "写一", "日本の", "次の", "한국", "ما هو", "क्या", "Wat is", "Jak", "Nasıl",
    )),
}  # fmt: skip


def opening(seed: int) -> str:
    """What the prompt with this seed begins with; empty where that is the header alone."""
    share, kind, one = np.random.default_rng((seed, _STREAM)).random(3)
    if share >= SHARE:
        return ""
    bounds = list(accumulate(weight for weight, _ in KINDS.values()))
    texts = list(KINDS.values())[int(np.searchsorted(bounds[:-1], kind, "right"))][1]
    return texts[int(one * len(texts))]
