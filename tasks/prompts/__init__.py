"""What models are asked, one module per task. These modules know no data and no scores.

The templates are for `str.format`. No template ends in white space: a tokenizer would separate it
from the first token of the answer.
"""
