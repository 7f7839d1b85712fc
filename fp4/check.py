"""The refusal of bad arguments, which every file of fp4/ shares."""


def check(condition, sentence):
    """Raises ValueError(sentence), which is for the user to read, unless the condition holds."""
    if not condition:
        raise ValueError(sentence)
