"""Wording of MMLU: a question, its four options, and a request for a letter."""

INSTRUCTION = "Each question on {subject} has one right option. Answer with its letter."

QUESTION = """\
Question: {question}
A. {choices[0]}
B. {choices[1]}
C. {choices[2]}
D. {choices[3]}"""

PLAIN = QUESTION + "\nAnswer:"

CHAT = (
    "Which option is right in this question on {subject}? Reply with its letter alone: A, B, C "
    "or D.\n\n" + QUESTION
)
