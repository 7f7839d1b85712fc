"""
Train a byte-level BPE vocabulary from the text of a corpus, in seconds.
"""
import collections
import heapq

import regex        # tiktoken depends on it, so it is always there

# Text is cut into words as GPT-4 does it: letters with the space or sign before them; up to three
# digits; signs; line ends; spaces, except the last, which goes to the word after it. Unlike in
# GPT-4's pattern, runs of spaces are bounded, because a million of them overflow tiktoken's stack.
PATTERN = (r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
           r"|\s{0,255}[\r\n]|\s{1,256}(?!\S)|\s")
BYTES = [bytes([value]) for value in range(256)]


def train_bpe(texts, size):
    """
    Trains a vocabulary on texts and returns it as {token: rank}.

    It begins with the 256 bytes. Then the most frequent pair of neighbours becomes a token, again
    and again, until there are `size` tokens or no pair occurs twice. Among equally frequent pairs
    the first in byte order is taken. Wikipedia's example is the word aaabdaaabac:

        a a a b d a a a b a c     4 aa, 2 ab, ...     token 256 is aa
        aa a b d aa a b a c       2 aaa, 2 ab, ...    token 257 is aaa, before ab in byte order
        aaa b d aaa b a c         2 aaab, ...         token 258 is aaab; no other pair occurs twice

    Equal words are kept once, with a weight, and a merge visits only the words that hold the pair.
    A pair is identified by its joined bytes, as in tiktoken's encoder.
    """
    words, weights = split_words(texts)
    counts, words_with = count_pairs(words, weights)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    ranks = {token: rank for rank, token in enumerate(BYTES)}
    while heap and len(ranks) < size:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count != counts[pair]:
            # Counts in the heap are not updated by merges; an old one is corrected here.
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if counts[pair] < 2:
            break
        ranks[pair] = len(ranks)
        for new_pair in merge_everywhere(pair, words, weights, counts, words_with):
            heapq.heappush(heap, (-counts[new_pair], new_pair))
    return ranks


def split_words(texts):
    """Returns the distinct words of the texts, as lists of single bytes, and their frequencies."""
    frequencies = collections.Counter()
    for text in texts:
        frequencies.update(regex.findall(PATTERN, text))
    words = [[BYTES[value] for value in word.encode()] for word in frequencies]
    return words, list(frequencies.values())


def count_pairs(words, weights):
    """Returns {pair: how often it occurs} and {pair: indices of the words that hold it}."""
    counts = collections.Counter()
    words_with = collections.defaultdict(set)
    for i, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            counts[left + right] += weights[i]
            words_with[left + right].add(i)
    return counts, words_with


def merge_everywhere(pair, words, weights, counts, words_with):
    """Merges a pair in all words, updates the counts, and returns the pairs that became more."""
    grown = set()
    for i in words_with.pop(pair):
        for changed_pair, change in merge(words[i], pair):
            counts[changed_pair] += change * weights[i]
            if change > 0:
                words_with[changed_pair].add(i)
                grown.add(changed_pair)
    return grown


def merge(word, pair):
    """
    Joins the neighbours in a word that make `pair`, in place and from the left.

    Yields (pair, -1) for each pair that this removes and (pair, +1) for each that it adds.
    """
    i = 0
    while i + 1 < len(word):
        if word[i] + word[i + 1] == pair:
            yield pair, -1
            if i > 0:
                yield word[i - 1] + word[i], -1
                yield word[i - 1] + pair, +1
            if i + 2 < len(word):
                yield word[i + 1] + word[i + 2], -1
                yield pair + word[i + 2], +1
            word[i:i + 2] = [pair]
        i += 1
