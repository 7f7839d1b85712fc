"""
A vocabulary of ours as the tokenizer.json of Hugging Face's package tokenizers: the same ids.

Both cut a text into words and merge neighbours in a word, the lowest number first and of equal
numbers the leftmost. tiktoken merges two neighbours if their joined bytes are a token, whose rank
is the number. A tokenizer.json lists which pairs may be merged, in their order. Why is one pair for
each token enough, although "abc" can be cut into "a" and "bc" or into "ab" and "c"?

Where tiktoken makes a token T of two parts, nothing has been merged across the ends of T before. So
what happened between them is what happens to the bytes of T alone, whatever stands around them, and
its last two parts are always the same: those that two_parts() finds. Of the pairs that tiktoken
could merge next, the lowest is therefore on the list; so both take the same.

Some tokens cannot come about by merges. tiktoken finds them all the same where a whole word is a
token, and so does a tokenizer.json with "ignore_merges".
"""
import json
import math

from data.bpe import PATTERN
from data.texts import END
from data.tokenizer import Gpt2, Own

# Oniguruma, which cuts the words there, takes {1,3}+ for "one to three, again and again", and not
# for "one to three, without going back". Nothing follows here that could make it go back.
OTHER_PATTERN = PATTERN.replace("{1,3}+", "{1,3}")


def files(vocabulary, longest):
    """Returns {name: text} of a tokenizer's files, none if it cannot be written, and then a
    sentence that says why.

    longest     a text for the model, in tokens
    """
    if isinstance(vocabulary, Own):
        return {
            "tokenizer.json": json.dumps(tokenizer(vocabulary.ranks), ensure_ascii=False),
            "tokenizer_config.json": json.dumps(tokenizer_config(longest), indent=2) + "\n",
        }, ""
    if isinstance(vocabulary, Gpt2):
        return {}, ("no tokenizer was written, because it is GPT-2's: "
                    'AutoTokenizer.from_pretrained("gpt2")')
    return {}, (f"no tokenizer was written, because the vocabulary is not of byte pairs "
                f"({vocabulary.kind}, {vocabulary.size:,} entries): give the model ids")


def end_id(vocabulary):
    """Returns the id of END, which opens every document; None if there is none."""
    return vocabulary.size - 1 if isinstance(vocabulary, (Own, Gpt2)) else None


def tokenizer_config(longest):
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }


def tokenizer(ranks):
    """Returns the content of tokenizer.json for a vocabulary {token: rank}."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": OTHER_PATTERN}, "behavior": "Isolated",
             "invert": False}
    end = {"id": len(ranks), "content": END, "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": False, "special": True}
    letters = letters_of_bytes()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {spelled(token, letters): rank for token, rank in ranks.items()},
            "merges": [f"{spelled(left, letters)} {spelled(right, letters)}"
                       for left, right in merges(ranks)],
        },
    }


def merges(ranks):
    """Returns the pair that each token is merged of, in the order of their ranks."""
    in_order = sorted(ranks, key=ranks.get)
    pairs = [two_parts(token, ranks) for token in in_order]
    return [pair for pair in pairs if len(pair) == 2]


def two_parts(token, ranks):
    """Returns the two parts that a token is merged of, in a list; more or fewer if it is not."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank_of_pair = [ranks.get(left + right, math.inf) for left, right in zip(parts, parts[1:])]
        lowest = min(rank_of_pair)
        if lowest == math.inf:
            break
        i = rank_of_pair.index(lowest)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ---- bytes as letters: a tokenizer.json is text, and not all bytes are

def letters_of_bytes():
    """Returns the letter of each byte, as GPT-2 has them: itself if it is visible in Latin-1, and
    the next one from U+0100 on otherwise."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [value for value in range(256) if value not in visible]
    return [chr(value) if value in visible else chr(0x100 + hidden.index(value))
            for value in range(256)]


def spelled(token, letters):
    return "".join(letters[value] for value in token)
