"""Wording of GSM8K: reasoning first, then the result in a sentence that the score looks for."""

INSTRUCTION = (
    "Solve the problem step by step. "
    'End with the sentence "The answer is N.", where N is the result as a number.'
)

PROBLEM = "Problem: {question}\nSolution:"

# The text after a worked example's problem; in a chat, the whole reply.
SOLUTION = "{steps}\nThe answer is {number}."

CHAT = INSTRUCTION + "\n\n{question}"
