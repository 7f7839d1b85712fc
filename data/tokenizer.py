"""
A byte-level BPE vocabulary of our own, trained in seconds from the corpus, so that no vocabulary has to be
downloaded. It lies beside the token files as vocab.tiktoken (tiktoken's text format: base64 token, rank),
and tiktoken does the encoding.
"""
import base64, collections, heapq, os
import regex, tiktoken
from .tokens import DataError

# words with the space or sign before them; numbers by three digits; signs; line ends; indentation
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
END = "<|endoftext|>"


def train_bpe(texts, size):
    """texts -> {token: rank}, `size` tokens: the 256 bytes, then again and again the most frequent pair made one.
    ["aaab aab"] has the pairs aa (3) and ab (2): the first merge is aa, then aab. Words repeat, so they are counted
    once; a merge visits only the words that hold the pair; the heap may be out of date and is checked when popped"""
    counts = collections.Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [(list(bytes([b]) for b in word.encode()), n) for word, n in sorted(counts.items())]
    pairs, where = collections.Counter(), collections.defaultdict(set)
    for i, (word, n) in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += n
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    ranks = {bytes([b]): b for b in range(256)}
    while heap and len(ranks) < size:
        n, pair = heapq.heappop(heap)
        if pairs[pair] != -n:
            continue                                            # an old entry; a current one is in the heap too
        ranks.setdefault(pair[0] + pair[1], len(ranks))
        changed = set()
        for i in where.pop(pair):
            word, count = words[i]
            merged = merge(word, pair)
            for old in zip(word, word[1:]): pairs[old] -= count; changed.add(old)
            for new in zip(merged, merged[1:]): pairs[new] += count; where[new].add(i); changed.add(new)
            words[i] = merged, count
        for p in changed:
            if pairs[p] > 0: heapq.heappush(heap, (-pairs[p], p))
    return ranks


def merge(word, pair):
    out, i = [], 0
    while i < len(word):
        both = i + 1 < len(word) and (word[i], word[i + 1]) == pair
        out.append(pair[0] + pair[1] if both else word[i])
        i += 2 if both else 1
    return out


def encoding_of(ranks, name="own"):
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def save(ranks, folder):
    with open(os.path.join(folder, "vocab.tiktoken"), "wb") as file:
        for token, rank in ranks.items():
            file.write(base64.b64encode(token) + b" %d\n" % rank)


def load_encoding(folder):
    """the encoding of a corpus; without a vocabulary beside it, GPT-2's, which tiktoken downloads once"""
    path = os.path.join(folder, "vocab.tiktoken")
    if os.path.exists(path):
        try: return encoding_of({base64.b64decode(token): int(rank) for token, rank in map(bytes.split, open(path, "rb"))})
        except ValueError: raise DataError(f"{path} is not a vocabulary: prepare the corpus again")
    try: return tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise DataError(f"{folder} has no vocab.tiktoken, and GPT-2's vocabulary cannot be downloaded here ({type(error).__name__})")


def vocab_size(folder, shards):
    """without downloading anything: ours, else Llama 3's or GPT-2's by the width of the tokens"""
    if os.path.exists(os.path.join(folder, "vocab.tiktoken")):
        return load_encoding(folder).n_vocab
    return 128256 if shards[0].dtype.itemsize == 4 else 50257
