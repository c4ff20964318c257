"""How near a written text is to the one that was wanted."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")
# BLEU looks at runs of up to four words.
ORDER = 4


def rouge_l(text: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words, lower-cased (Lin 2004, "ROUGE", section 3.1, with beta 1)."""
    ours, theirs = (_WORD.findall(one.lower()) for one in (text, wanted))
    if not ours or not theirs:
        return 0.0
    # best[j]: of our words so far and their first j.
    best = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for j, other in enumerate(theirs, 1):
            above = best[j]
            best[j] = before + 1 if word == other else max(above, best[j - 1])
            before = above
    return 2.0 * best[-1] / (len(ours) + len(theirs))


def bleu_counts(text: str, wanted: str) -> list[float]:
    """What BLEU adds up over texts: words of ours and of theirs, then per order the runs found and all of ours."""
    from sacrebleu.metrics.bleu import BLEU

    found = BLEU().corpus_score([text], [[wanted]])
    return [float(count) for count in (found.sys_len, found.ref_len, *found.counts, *found.totals)]


def bleu(counts: Sequence[float]) -> float:
    """BLEU from 0 to 1 of summed counts (Papineni et al. 2002, section 2.3), as sacrebleu computes a corpus's."""
    from sacrebleu.metrics.bleu import BLEU

    ours, theirs, *rest = (int(count) for count in counts)
    return BLEU.compute_bleu(rest[:ORDER], rest[ORDER:], ours, theirs, smooth_method="exp").score / 100.0
