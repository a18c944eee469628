"""What models are asked, one module a task. Knows wording, no data and no scores.

Templates are for `str.format`; none ends in white space, which a tokenizer would part from the
first token of the answer.
"""
