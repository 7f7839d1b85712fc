"""
A byte-level BPE vocabulary of our own, trained from the corpus in seconds, so that none has to be downloaded.
It lies beside the token files as vocab.tiktoken (tiktoken's text format: base64 of the token, rank), and
tiktoken encodes with it.
"""
import base64, collections, heapq, os
import regex, tiktoken                                  # regex: comes with tiktoken
from data.tokens import DataError

# GPT-4's way to cut a text: a word with the space or sign before it; three digits; signs; line ends; spaces
# but for the last, which goes to the word. Runs of spaces are bounded: a million overflow tiktoken's stack
PATTERN = (r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
           r"|\s{0,255}[\r\n]|\s{1,256}(?!\S)|\s")
END = "<|endoftext|>"                                   # opens every document; the last id of a vocabulary


def train_bpe(texts, size):
    """
    texts -> {token: rank}: the 256 bytes, then again and again the most frequent pair of neighbours, until
    there are `size` tokens or no pair is found twice. Wikipedia's example, the word aaabdaaabac:

        a a a b d a a a b a c     4 aa, 2 ab, ...     token 256 is aa
        aa a b d aa a b a c       2 aaa, 2 ab, ...    token 257 is aaa: of equals, the first in byte order
        aaa b d aaa b a c         2 aaab, ...         token 258 is aaab; then no pair is left twice

    Equal words are kept once, with a weight; a merge visits only the words that hold the pair. A pair is its
    joined bytes, as in tiktoken's encoder. Counts in the heap may be old: they are corrected when popped.
    """
    found = collections.Counter()
    for text in texts: found.update(regex.findall(PATTERN, text))
    words = [[bytes([b]) for b in word.encode()] for word in found]
    weights = list(found.values())
    counts, where = collections.Counter(), collections.defaultdict(set)     # pair -> how often, in what words
    for i, word in enumerate(words):
        for a, b in zip(word, word[1:]):
            counts[a + b] += weights[i]
            where[a + b].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    ranks = {bytes([b]): b for b in range(256)}
    while heap and len(ranks) < size:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -n < 2: break
        ranks.setdefault(pair, len(ranks))              # a token already: two ways to make it, rare
        grown = set()
        for i in where.pop(pair):
            for p, change in merge(words[i], pair):
                counts[p] += change * weights[i]
                if change > 0:
                    where[p].add(i)
                    grown.add(p)
        for p in grown: heapq.heappush(heap, (-counts[p], p))
    return ranks


def merge(word, pair):
    """join neighbours that make `pair`, in place, from the left; yields pairs that go (-1), come (+1)"""
    i = 0
    while i + 1 < len(word):
        if word[i] + word[i + 1] == pair:
            yield pair, -1
            for left in word[max(i - 1, 0):i]: yield from ((left + word[i], -1), (left + pair, +1))
            for right in word[i + 2:i + 3]: yield from ((word[i + 1] + right, -1), (pair + right, +1))
            word[i:i + 2] = [pair]
        i += 1


def encoding_of(ranks):
    return tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def save(ranks, path):
    with open(path, "wb") as file:
        file.writelines(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def load(path):
    """vocab.tiktoken -> {token: rank}; tiktoken's own reader caches by path and would miss a new file"""
    try:
        with open(path, "rb") as file:
            pairs = [line.split() for line in file]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the vocabulary {path} ({error}): prepare the corpus again")
    if {bytes([b]) for b in range(256)} - ranks.keys() or sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{path} is no whole vocabulary, a byte or rank is missing: prepare the corpus again")
    return ranks


def load_encoding(path):
    """the encoding of a corpus folder or a vocabulary file; where there is none GPT-2's, downloaded once"""
    file = os.path.join(path, "vocab.tiktoken") if os.path.isdir(path) else path
    if os.path.exists(file):
        return encoding_of(load(file))
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:              # requests' errors are OSErrors
        raise DataError(f"{file} is not there, and GPT-2's vocabulary cannot be downloaded "
                        f"({type(error).__name__}): connect once, and tiktoken keeps a copy")


def vocab_size(folder, shards):
    """without a download: of our vocabulary, else Llama 3's or GPT-2's by the width of the tokens"""
    if os.path.exists(os.path.join(folder, "vocab.tiktoken")):
        return load_encoding(folder).n_vocab
    return 128256 if shards[0].dtype.itemsize == 4 else 50257
